"""What training holds on each GPU and how many FLOP an update takes, counted on `meta`: shapes without memory.

`train.py --dry-run` prints it for a command, `python -m tools.memory` for SD1.5 and SDXL. It is a sum, not a
measurement: the libraries need 1 to 2 GiB more on a GPU, and all activations are counted in the frozen networks' dtype,
which most have under autocast.
"""

import argparse
import functools
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from support import lora
from support.devices import rank_and_world
from support.weights import build

GIB, TERA = 2**30, 10**12


def count(
    networks: dict[str, nn.Module],
    shape: tuple[int, ...],
    args: argparse.Namespace,
    world: int,
    blocks: tuple[type, ...],
    low: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, int], float]:
    """(bytes on each GPU by what they are for, FLOP of an update) of a run with train.py's settings `args`.

    networks: the model's, wherever they are. shape: of a latent, (C, h, w). world: number of processes. blocks: types
    of modules that gradient checkpointing computes again. low: dtype of frozen networks.
    """
    settings = shape, args.batch_size, args.lora, args.gradient_checkpointing, blocks, low
    trained, saved, teaching, learning = passes(networks["unet"], *settings)
    numbers = {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}
    frozen, vae = numbers.pop("unet"), numbers.pop("vae")
    parts = {
        "trained weights": 4 * trained,
        "gradients": 4 * trained,  # DDP's buckets are views of them
        "AdamW's moments": 8 * trained // world,
        "EMA": 4 * trained,
        "trained weights in bfloat16, kept by autocast": 2 * trained if low == torch.bfloat16 else 0,
        "update of the teacher": 4 * trained if args.lora and args.base != args.teacher else 0,
        "frozen UNet": low.itemsize * frozen,  # the teacher; with LoRA, also what the student's update is added to
        "text encoders": low.itemsize * sum(numbers.values()),
        "VAE": 4 * vae,
        "activations": saved,
    }
    nfe = teacher_nfe(args.solver_steps, args.teacher_guidance) / args.reuse
    used = {name: size for name, size in parts.items() if size}
    return used, args.grad_accum_steps * (nfe * teaching + learning)


def teacher_nfe(steps: int, guidance: float = 1.0) -> int:
    """Forward passes for a sample's trajectory: two for a step with guidance."""
    return steps * (1 if guidance == 1 else 2)


@functools.cache
def passes(
    unet: nn.Module, shape: tuple, batch: int, rank: int | None, recompute: bool, blocks: tuple, low: torch.dtype
) -> tuple[int, int, int, int]:
    """Of a batch: trained numbers, bytes that the backward pass needs, FLOP of a teacher step, FLOP of the student."""
    base = build(type(unet), unet.cfg).to(low)
    student = lora.attach(base, rank, 0).to(low) if rank else base
    given = inputs(unet.cfg, shape, batch, low)
    with mock.patch.object(F, "scaled_dot_product_attention", flash_attention):
        with FlopCounterMode(display=False) as teacher_counter:
            base(*given)
        student.requires_grad_(True)
        with FlopCounterMode(display=False) as student_counter:
            saved = bytes_saved(student, given, blocks, recompute)
    teaching, forward = teacher_counter.get_total_flops(), student_counter.get_total_flops()
    # To the inputs, and to the trained weights: of LoRA, those of the update only.
    backward = forward + (forward - teaching if rank else forward)
    trained = sum(weight.numel() for weight in student.parameters())
    return trained, saved, teaching, forward + backward + (forward if recompute else 0)


def inputs(cfg, shape: tuple[int, ...], batch: int, low: torch.dtype) -> tuple[Tensor, ...]:
    """What a UNet is given: latents, times, text; SDXL also pooled text and image sizes."""
    with torch.device("meta"):
        x, context = torch.empty(batch, *shape, dtype=low), torch.empty(batch, 77, cfg.cross_attention_dim, dtype=low)
        if not cfg.addition_embed_type:
            return x, torch.empty(batch), context
        pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
        return x, torch.empty(batch), context, torch.empty(batch, pooled, dtype=low), torch.empty(batch, 6)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What GPUs use; `meta` would take the slow way, which keeps a matrix of all pairs of positions."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def bytes_saved(network: nn.Module, given: tuple[Tensor, ...], blocks: tuple[type, ...], recompute: bool) -> int:
    """Bytes that the backward pass needs from the forward pass. With gradient checkpointing: the inputs of all blocks,
    and what the largest block computes again."""
    weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
    saved, sizes, entered = {}, [], []  # saved: storage -> (bytes, tensor); each counts once

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.grad_fn is not None and storage._cdata not in weights:  # not an input, a weight or a view of one
            saved[storage._cdata] = (storage.nbytes(), tensor)  # kept, so that no other takes its place
        return tensor

    def total() -> int:
        return sum(size for size, _ in saved.values())

    def before(block: nn.Module, args: tuple) -> None:
        entered.append(args[0].nbytes)
        sizes.append(-total())

    def after(block: nn.Module, args: tuple, out: Tensor) -> None:
        sizes[-1] += total()

    for block in network.modules():
        if isinstance(block, blocks):
            block.register_forward_pre_hook(before)
            block.register_forward_hook(after)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        network(*given)
    return total() - sum(sizes) + sum(entered) + max(sizes) if recompute else total()


def dry_run(
    args: argparse.Namespace, networks: dict[str, nn.Module], shape: tuple[int, ...], blocks: tuple[type, ...]
) -> None:
    """Print GiB by what they are for, and time at args.dry_run TFLOP/s; of several processes, the first one does."""
    rank, world = rank_and_world()
    if rank > 0:
        return
    parts, flop = count(networks, shape, args, world, blocks, torch.float32 if args.device == "cpu" else torch.bfloat16)
    for name, size in parts.items():
        print(f"{size / GIB:8.2f} GiB  {name}")
    print(f"{sum(parts.values()) / GIB:8.2f} GiB  in all on each GPU, and 1 to 2 for the libraries")
    hourly = 3600 * args.dry_run * TERA / flop
    print(f"{flop / TERA:8.2f} TFLOP in an update: at {args.dry_run:g} TFLOP/s, {hourly:,.0f} updates an hour, and")
    print(f"{args.iters / hourly:8.2f} hours for {args.iters:,} updates")
