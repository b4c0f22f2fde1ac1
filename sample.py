"""From prompts to images.

    python sample.py --steps 4 --prompt "a red circle" "a small blue ring above a big green square"
    torchrun --nproc-per-node 8 sample.py --model DIR --prompts captions_val2014.json --steps 4 --out DIR

`generate` is the whole of it: draw noise, let a solver walk it to an image, decode. Image i of a run depends on
(seed, i) alone, not on batches or processes. Running a command again makes only what is missing, and what a change of
the model or of the settings would make otherwise. Read `reflow.py` and `model.py` before this file.

Shapes: B batch, z latents (B, 4, h, w), H W height and width in pixels.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import reflow
from model import FLOW, MINIATURE, StableDiffusion
from support import lora, lora_files
from support.captions import read_prompts, unlearned_words
from support.devices import choose_device, rank_and_world
from support.errors import InputError, Parser, at_least_0, one_line_errors, positive_int, seed
from support.files import make_folder, version_of
from support.images import image_grid, read_image, save_png, settings_of_png, to_pixels, write_png
from support.scoring import add_up
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
) -> np.ndarray:
    """Images of the prompts, uint8 (B, H, W, 3).

    sampler: "flow", "ddim" or "dpm++"; by default the one that fits the model. latents: start from these (B, 4, h, w)
    instead of noise drawn for (seed, indices); indices are 0, 1, ... by default. size: height and width in pixels.
    guidance_scale: by default the model's own, `StableDiffusion.guidance`. Raises InputError.
    """
    size, sampler = sd.image_size(size), check_sampler(sd, sampler, steps)
    if latents is None:
        shape = sd.unet.cfg.in_channels, size // sd.downscale, size // sd.downscale
        latents = draw_noise(seed, list(range(len(prompts))) if indices is None else indices, shape)
    height, width = (n * sd.downscale for n in latents.shape[2:])
    guidance_scale = sd.guidance if guidance_scale is None else guidance_scale
    uncond = sd.conditions([negative_prompt], height, width) if guidance_scale != 1 else None
    epsilon = sd.epsilon(sd.conditions(prompts, height, width), guidance_scale, uncond)
    z = latents.to(sd.device, torch.float32)  # fp32 whatever the network's dtype: sums of many small steps
    if sampler == "flow":
        velocity = reflow.as_velocity(epsilon, sd.alphas_cumprod, sd.windows, sd.prediction_type)
        z = reflow.euler(velocity, z, reflow.sampling_grid(steps, sd.windows))
    else:
        solve = {"ddim": reflow.ddim, "dpm++": dpm_solver}[sampler]
        z = solve(epsilon, z, sd.alphas_cumprod, torch.tensor(reflow.boundaries(steps)))
    return to_pixels(sd.decode(z))


def dpm_solver(epsilon: reflow.Network, z: Tensor, alphas_cumprod: Tensor, grid: Tensor) -> Tensor:
    """A diffusion model's ODE with DPM-Solver++ 2M (Lu et al. 2022, "DPM-Solver++", algorithm 2), for few steps.

    It predicts the image and extrapolates linearly from the last two predictions, in lambda = log(signal / noise). The
    last step is of first order, as is usual for fewer than 15 steps. grid: falling taus, (N + 1,). N evaluations.
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
            extrapolated = image
        else:
            extrapolated = image + (image - before) * h / (2 * (lam[i] - lam[i - 1]))
        z = noise[i + 1] / noise[i] * z - signal[i + 1] * torch.expm1(-h) * extrapolated
        before = image
    return z


def check_sampler(sd: StableDiffusion, sampler: str | None, steps: int) -> str:
    """The sampler that fits the model and this number of steps. Raises InputError where there is none."""
    sampler = sampler or ("flow" if sd.windows else "ddim")
    if (sampler == "flow") != (sd.windows is not None):
        kind, fitting = ("flow", "flow") if sd.windows else ("diffusion model", "ddim or dpm++")
        raise InputError(f"--sampler {sampler} does not fit: the model is a {kind}; use {fitting}")
    least, most = sd.windows or 1, reflow.NOISE
    if not least <= steps <= most:
        why = f" (the model has {least} windows)" if sd.windows else ""
        raise InputError(f"--steps must be from {least} to {most}{why}, not {steps}")
    return sampler


def notices(sd: StableDiffusion, args: argparse.Namespace, prompts: list[str], guidance: float) -> None:
    """What was asked for and has no effect, or not the expected one."""
    if words := unlearned_words(sd.tokenizers[0].bpe, prompts):
        print(f"notice: words that this model never learned: {', '.join(words)}", file=sys.stderr)
    if args.negative_prompt and guidance == 1:
        print("notice: --negative-prompt has no effect without guidance (--guidance 1)", file=sys.stderr)
    if guidance == 0:
        print("notice: --guidance 0 ignores the prompt; 1 is no guidance", file=sys.stderr)
    if sd.guidance == 1 and guidance != 1:
        print("notice: this flow holds guidance already; --guidance adds to it", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    rank, world = rank_and_world()
    prompts = read_prompts(args.prompts) if args.prompts else args.prompt
    make_folder(args.out)
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "float16"))
    args.model = args.model or (MINIATURE if args.lora else FLOW)
    sd = StableDiffusion.load(args.model, device, dtype, args.tokenizer, args.variant)
    if args.lora:
        update, facts = lora_files.read(args.lora, sd.unet)
        lora.merged(sd.unet, update, facts["scale"])
        sd.configs["scheduler"] = facts["scheduler"]
    size, sampler = sd.image_size(args.size), check_sampler(sd, args.sampler, args.steps)
    guidance = sd.guidance if args.guidance is None else args.guidance
    if args.compile:
        sd.unet.compile()
    if rank == 0:
        notices(sd, args, prompts, guidance)

    prompts = [prompt for prompt in prompts for _ in range(args.n)]
    settings = {
        "software": "proreflow", "negative_prompt": args.negative_prompt, "seed": args.seed, "steps": args.steps,
        "guidance": guidance, "sampler": sampler, "size": size, "dtype": str(dtype).removeprefix("torch."),
        "model": args.model.name, "weights": version_of(*filter(None, (args.model, args.tokenizer, args.lora))),
    }  # fmt: skip
    settings = [
        {k: str(v) for k, v in settings.items()} | {"prompt": p, "index": str(i)} for i, p in enumerate(prompts)
    ]
    files = [args.out / f"{i:05d}.png" for i in range(len(prompts))]
    if folders := [file for file in files if file.is_dir()]:
        raise InputError(
            f"{folders[0]} is a folder, where an image is to be written; remove it or choose another --out"
        )
    todo = [i for i in range(rank, len(prompts), world) if settings_of_png(files[i]) != settings[i]]
    for few in tqdm([todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)], disable=rank > 0):
        images = generate(
            sd, [prompts[i] for i in few], args.steps, guidance, args.seed, args.negative_prompt, sampler,
            size=size, indices=few,
        )  # fmt: skip
        for i, image in zip(few, images):
            save_png(image, files[i], settings[i])

    add_up(torch.zeros(1))  # wait for all processes: the sheet needs everybody's images
    if rank == 0:
        shown = range(min(len(prompts), 64))
        columns = args.n if 1 < args.n <= 8 else min(len(shown), 8)
        sheet = image_grid([np.array(read_image(files[i])) for i in shown], [prompts[i] for i in shown], columns)
        write_png(sheet, args.out / "sheet.png")
        made = f"{len(prompts)} images, {args.steps} steps of {SAMPLERS[sampler]}, guidance {guidance:g}"
        print(f"{made}: {files[0]} ..., all on {args.out}/sheet.png")
        if others := {file.name for file in args.out.glob("*.png")} - {file.name for file in files} - {"sheet.png"}:
            print(f"notice: {args.out} also holds {len(others)} images that are not of this run", file=sys.stderr)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", help="one or more prompts")
    source.add_argument("--prompts", type=Path, help="a file with a prompt per line, or a COCO captions JSON")
    parser.add_argument("--model", type=Path, help="model folder or single .safetensors file; default: ProReflow-I")
    parser.add_argument("--lora", type=Path, help="make a flow of the diffusion model: a file of train.py --lora")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer(s), for a single file")
    parser.add_argument("--variant", help="which of a folder's weight files, such as fp16")
    parser.add_argument("--steps", type=positive_int, default=4, help="NFE per image; twice as many with guidance")
    parser.add_argument(
        "--guidance", type=at_least_0, help="guidance scale, 1: none; default: 4, or 1 for guided flows"
    )
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: flow for flows, ddim for diffusion models")
    parser.add_argument("--seed", type=seed, default=0, help="image i depends on (seed, i) alone")
    parser.add_argument("--n", type=positive_int, default=1, help="images per prompt")
    parser.add_argument("--size", type=positive_int, help="height and width in pixels; default: the model's")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="images per forward pass")
    parser.add_argument("--out", type=Path, default=Path("out/samples"), help="folder for images and sheet.png")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: this process's GPU if there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float16, on CPU float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: slow to start, then faster")
    with one_line_errors(parser, "stopped; the same command goes on where it was"):
        run(parser.parse_args())


if __name__ == "__main__":
    main()
