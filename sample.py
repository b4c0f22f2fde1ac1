"""From prompts to images.

    python sample.py --steps 4 --prompt "a red circle" "a small blue ring above a big green square"
    torchrun --nproc-per-node 8 sample.py --model DIR --prompts captions_val2014.json --steps 4 --out DIR

`generate` is the whole of it: draw noise, let a solver of `reflow.py` walk it to an image, decode. Image i of a run
depends on (seed, i) alone, not on how images are batched or spread over processes. Running a command again makes only
what is missing.
"""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import reflow
from model import FLOW, StableDiffusion
from support.captions import read_prompts
from support.devices import choose_device, rank_and_world
from support.errors import InputError, one_line_errors
from support.files import fingerprint, make_folder
from support.images import image_grid, save_png, settings_of_png, to_pixels
from support.streams import draw_noise

SAMPLERS = {"flow": "windowed Euler", "ddim": "DDIM", "dpm++": "DPM-Solver++ 2M"}


@torch.no_grad()
def generate(
    sd: StableDiffusion,
    prompts: list[str],
    steps: int = 4,
    guidance_scale: float | None = None,
    seed: int = 0,
    negative_prompt: str = "",
    sampler: str | None = None,
    latents: Tensor | None = None,
    size: int | None = None,
    indices: list[int] | None = None,
    low_memory: bool = False,
) -> np.ndarray:
    """Images of the prompts, uint8 (B, H, W, 3).

    sampler: "flow", "ddim" or "dpm++"; by default the one that fits the model. latents: start from these (B, 4, h, w)
    instead of noise drawn for (seed, indices); indices are 0, 1, ... by default. size: height and width in pixels.
    guidance_scale: by default the model's own, `StableDiffusion.guidance`. low_memory: for decoding, see `vae.py`.
    Raises InputError.
    """
    size = sd.image_size(size)
    sampler = check_sampler(sd, sampler, steps)
    if latents is None:
        shape = (sd.unet.cfg.in_channels, size // sd.downscale, size // sd.downscale)
        latents = draw_noise(seed, list(range(len(prompts))) if indices is None else indices, shape)
    height, width = (n * sd.downscale for n in latents.shape[2:])
    guidance_scale = sd.guidance if guidance_scale is None else guidance_scale
    conditions = sd.conditions(prompts, height, width)
    uncond = sd.conditions([negative_prompt], height, width) if guidance_scale != 1 else None
    epsilon = sd.epsilon(conditions, guidance_scale, uncond)
    z = latents.to(sd.device, torch.float32)  # fp32 whatever the network's dtype: sums of many small steps
    if sampler == "flow":
        velocity = reflow.as_velocity(epsilon, sd.alphas_cumprod, sd.windows, sd.prediction_type)
        z = reflow.euler(velocity, z, reflow.sampling_grid(steps, sd.windows))
    else:
        solve = {"ddim": reflow.ddim, "dpm++": dpm_solver}[sampler]
        z = solve(epsilon, z, sd.alphas_cumprod, torch.tensor(reflow.boundaries(steps)))
    return to_pixels(sd.decode(z, low_memory))


def dpm_solver(epsilon: reflow.Network, z: Tensor, alphas_cumprod: Tensor, grid: Tensor) -> Tensor:
    """The same path with DPM-Solver++ 2M (Lu et al. 2022, "DPM-Solver++", algorithm 2), for sampling in few steps.

    It predicts the image and extrapolates linearly from the last two predictions, in lambda = log(signal / noise).
    The last step is of first order, as is usual for fewer than 15 steps. grid: falling taus, (N + 1,). N evaluations.
    """
    grid = grid.to(z.device)
    a = reflow.alpha_bar(alphas_cumprod, grid)
    signal, noise = a.sqrt(), (1 - a).sqrt()
    lam = (signal / noise).log()
    steps = len(grid) - 1
    before = None
    for i in range(steps):
        image = (z - noise[i] * epsilon(z, grid[i].expand(len(z)))) / signal[i]
        h = lam[i + 1] - lam[i]
        if i == 0 or i == steps - 1:
            guess = image
        else:
            guess = image + (image - before) * h / (2 * (lam[i] - lam[i - 1]))
        z = noise[i + 1] / noise[i] * z - signal[i + 1] * torch.expm1(-h) * guess
        before = image
    return z


def check_sampler(sd: StableDiffusion, sampler: str | None, steps: int) -> str:
    sampler = sampler or ("flow" if sd.windows else "ddim")
    if (sampler == "flow") != (sd.windows is not None):
        kind, fitting = ("flow", "flow") if sd.windows else ("diffusion model", "ddim or dpm++")
        raise InputError(f"sampler {sampler} does not fit: the model is a {kind}; use {fitting}")
    least, most = sd.windows or 1, reflow.NOISE
    if not least <= steps <= most:
        why = f" (the model has {least} windows)" if sd.windows else ""
        raise InputError(f"steps must be from {least} to {most}{why}, not {steps}")
    return sampler


def unlearned_words(sd: StableDiffusion, prompts: list[str]) -> list[str]:
    """Words that a model of small vocabulary has never seen. CLIP's official one spells rare words from common pieces,
    the miniature's has every word of its captions as one token and no other."""
    bpe = sd.tokenizers[0].bpe
    if bpe.get_vocab_size() > 5000:
        return []
    words = dict.fromkeys(word.strip(",.") for prompt in prompts for word in prompt.split())
    return [word for word in words if len(bpe.encode(word, add_special_tokens=False).ids) > 1]


def run(args: argparse.Namespace) -> None:
    rank, world = rank_and_world()
    prompts = read_prompts(args.prompts) if args.prompts else args.prompt
    make_folder(args.out)
    if args.n < 1 or args.batch_size < 1:
        raise InputError("--n and --batch-size must be at least 1")
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "float16"))
    sd = StableDiffusion.load(args.model, device, dtype, args.tokenizer)
    size, sampler = sd.image_size(args.size), check_sampler(sd, args.sampler, args.steps)
    guidance = sd.guidance if args.guidance is None else args.guidance
    if args.compile:
        sd.unet.compile()
    if words := unlearned_words(sd, prompts):
        print(f"notice: words that this model never learned: {', '.join(words)}", file=sys.stderr)

    everything = [prompt for prompt in prompts for _ in range(args.n)]
    settings = {
        "negative_prompt": args.negative_prompt, "seed": args.seed, "steps": args.steps, "guidance": guidance,
        "sampler": sampler, "size": size, "dtype": str(dtype).removeprefix("torch."), "model": args.model.name,
        "weights": fingerprint(sd.unet.conv_in.weight, sd.unet.conv_out.weight),
    }  # fmt: skip
    settings = {name: str(value) for name, value in settings.items()}
    file_of = [args.out / f"{i:05d}.png" for i in range(len(everything))]
    mine = range(rank, len(everything), world)
    todo = [i for i in mine if settings_of_png(file_of[i]) != settings | {"prompt": everything[i], "index": str(i)}]
    for few in tqdm([todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)], disable=rank > 0):
        images = generate(
            sd, [everything[i] for i in few], args.steps, guidance, args.seed, args.negative_prompt, sampler,
            size=size, indices=few, low_memory=args.low_memory,
        )  # fmt: skip
        for i, image in zip(few, images):
            save_png(image, file_of[i], settings | {"prompt": everything[i], "index": str(i)})

    if world > 1:  # the sheet needs everybody's images
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        shown = range(min(len(everything), 64))
        columns = args.n if 1 < args.n <= 8 else min(len(shown), 8)
        images = [np.array(Image.open(file_of[i])) for i in shown]
        sheet = image_grid(images, [everything[i] for i in shown], columns)
        sheet.save(args.out / "sheet.partial", format="PNG")
        os.replace(args.out / "sheet.partial", args.out / "sheet.png")
        made = f"{len(everything)} images, {args.steps} steps of {SAMPLERS[sampler]}, guidance {guidance:g}"
        print(f"{made}: {args.out}/00000.png ..., all on {args.out}/sheet.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make images of prompts.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", help="one or more prompts")
    source.add_argument("--prompts", type=Path, help="a file with a prompt per line, or a COCO captions JSON")
    parser.add_argument("--model", type=Path, default=FLOW, help="model folder, or single .safetensors file")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer(s), for a single file")
    parser.add_argument("--steps", type=int, default=4, help="network evaluations per image (two with guidance)")
    parser.add_argument(
        "--guidance", type=float, help="classifier-free guidance scale, 1 for none; default: 4, or what the flow is for"
    )
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: flow for flows, ddim for diffusion models")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) alone")
    parser.add_argument("--n", type=int, default=1, help="images per prompt")
    parser.add_argument("--size", type=int, help="height and width in pixels; default: the model's")
    parser.add_argument("--batch-size", type=int, default=16, help="images made at once")
    parser.add_argument("--out", type=Path, default=Path("out/samples"), help="folder for images and sheet.png")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float16, on CPU float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: slow to start, then faster")
    parser.add_argument("--low-memory", action="store_true", help="decode in bands of rows: the same images")
    with one_line_errors(parser, "stopped; the same command goes on where it was"):
        run(parser.parse_args())


if __name__ == "__main__":
    main()
