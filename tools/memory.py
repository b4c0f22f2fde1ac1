"""What training holds on each GPU, counted without one: parameters and activations on the `meta` device.

    python -m tools.memory              SD1.5 at 512 and SDXL at 1024 pixels, by batch size, as a table

A sum, not a measurement: it leaves out what the libraries need for their work (1 to 2 GiB on a GPU), and takes
activations as bfloat16, as most are under autocast.
"""

import argparse
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import NETWORKS
from support.official import OFFICIAL
from support.weights import build, read_config
from unet import ResnetBlock, Transformer, UNet, UNetConfig

GIB = 2**30
FP32, BF16 = 4, 2  # bytes


def fixed(networks: dict[str, nn.Module]) -> dict[str, int]:
    """Bytes that do not depend on the batch, by what they are for (`train.py`)."""
    counts = {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}
    unet, vae = counts.pop("unet"), counts.pop("vae")
    return {
        "student, fp32": FP32 * unet,
        "gradients": FP32 * unet,  # DDP's buckets are views of them
        "AdamW's moments": 2 * FP32 * unet,
        "EMA": FP32 * unet,
        "student in bf16, kept by autocast": BF16 * unet,
        "teacher, bf16": BF16 * unet,
        "text encoders, bf16": BF16 * sum(counts.values()),
        "VAE, fp32": FP32 * vae,
    }


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What GPUs use; `meta` would take the slow way, which keeps a matrix of all pairs of positions."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def activations(cfg: UNetConfig, batch: int, pixels: int, recompute: bool) -> int:
    """Bytes that the backward pass of the student needs from its forward pass. With gradient checkpointing: the inputs
    of all blocks, and what the largest block computes again."""
    unet = build(UNet, cfg).to(torch.bfloat16).requires_grad_(True)
    weights = {weight.untyped_storage()._cdata for weight in unet.parameters()}
    saved, blocks, inputs = {}, [], []  # saved: storage -> (bytes, tensor); each counts once

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = (storage.nbytes(), tensor)  # kept, so that no other takes its place
        return tensor

    def total() -> int:
        return sum(size for size, _ in saved.values())

    def before(block: nn.Module, given: tuple) -> None:
        inputs.append(given[0].numel() * BF16)
        blocks.append(-total())

    def after(block: nn.Module, given: tuple, out: Tensor) -> None:
        blocks[-1] += total()

    for module in unet.modules():
        if isinstance(module, ResnetBlock | Transformer):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    with torch.device("meta"):
        x = torch.empty(batch, 4, pixels // 8, pixels // 8, dtype=torch.bfloat16)
        t, context = torch.empty(batch), torch.empty(batch, 77, cfg.cross_attention_dim, dtype=torch.bfloat16)
        pooled, time_ids = torch.empty(batch, 1280, dtype=torch.bfloat16), torch.empty(batch, 6)
    attention = mock.patch.object(F, "scaled_dot_product_attention", flash_attention)
    with attention, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        unet(x, t, context, pooled, time_ids)
    return total() - sum(blocks) + sum(inputs) + max(blocks) if recompute else total()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for family, pixels in ("SD1.5", 512), ("SDXL", 1024):
        official = {name: OFFICIAL[family][name] for name in NETWORKS if name in OFFICIAL[family]}
        configs = {name: read_config(NETWORKS[name][1], settings, name) for name, settings in official.items()}
        parts = fixed({name: build(NETWORKS[name][0], config) for name, config in configs.items()})
        base = sum(parts.values())
        print(f"{family}, {pixels} pixels: {base / GIB:.1f} GiB without activations")
        for name, size in parts.items():
            print(f"  {name}: {size / GIB:.1f}")
        for flag, recompute in ("--no-recompute", False), ("--recompute", True):
            sizes = {n: base + activations(configs["unet"], n, pixels, recompute) for n in (1, 2, 4, 8)}
            print(f"  in all, {flag}: " + ", ".join(f"{size / GIB:.1f} at batch {n}" for n, size in sizes.items()))


if __name__ == "__main__":
    main()
