"""From prompts to pictures.

    python sample.py --steps 4 --prompt "a red circle" "a small blue ring above a big green square"
    torchrun --nproc-per-node 8 sample.py --model DIR --prompts captions_val2014.json --steps 4 --out DIR

`generate` is the whole of it: draw noise, let a solver of `reflow.py` walk it to an image, decode. Picture i of a run
depends on (seed, i) alone, not on how pictures are batched or spread over processes. Running a command again makes only
what is missing.
"""

import argparse
import hashlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

import checkpoint
import reflow
from model import InputError, StableDiffusion

MINIATURE = Path(__file__).parent / "weights/miniature"  # a diffusion model
FLOW = Path(__file__).parent / "weights/proreflow-i-guided"  # what train.py made of it, for few steps
SAMPLERS = {"flow": "windowed Euler", "ddim": "DDIM", "dpm++": "DPM-Solver++ 2M"}


def draw_noise(seed: int, indices: list[int], shape: tuple[int, ...]) -> Tensor:
    """The noise that pictures number `indices` of a run start from: (B, *shape), fp32, the same on every machine.

    NumPy's, because it takes a pair as seed: torch's CPU generator uses only the lower 32 bits of one number.
    """
    if not 0 <= seed < 2**32:  # a larger one is two words to NumPy, and could stand for another pair
        raise InputError(f"seed must be from 0 to 2^32 - 1, not {seed}")
    draws = [np.random.default_rng((seed, i)).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(draws))


def guided_epsilon(
    sd: StableDiffusion, prompts: list[str], guidance_scale: float, negative_prompt: str, height: int, width: int
) -> reflow.Network:
    """(z, tau) -> the noise that the model sees in z, with classifier-free guidance (Ho & Salimans 2022):

        eps = eps(negative) + guidance_scale (eps(prompt) - eps(negative))

    Both come from one batch of twice the size; a scale of 1 needs no negative and half the work.
    """
    guided = guidance_scale != 1
    context, pooled = sd.encode_prompt([negative_prompt] * len(prompts) * guided + prompts)
    text = sd.unet.text_keys_values(context)  # the same at every step, so computed before the first
    time_ids = sd.time_ids(len(context), height, width)
    shift = 0 if sd.windows else 1  # a pretrained network counts from 0 to 999, see reflow.py

    def epsilon(z: Tensor, tau: Tensor) -> Tensor:
        if not guided:
            return sd.unet(z.to(sd.dtype), tau - shift, text, pooled, time_ids).float()
        both = sd.unet(torch.cat([z, z]).to(sd.dtype), torch.cat([tau, tau]) - shift, text, pooled, time_ids).float()
        negative, positive = both.chunk(2)
        return negative + guidance_scale * (positive - negative)

    return epsilon


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
    """Pictures of the prompts, uint8 (B, H, W, 3).

    sampler: "flow", "ddim" or "dpm++"; by default the one that fits the model. latents: start from these (B, 4, h, w)
    instead of noise drawn for (seed, indices); indices are 0, 1, ... by default. size: height and width in pixels.
    guidance_scale: by default the model's own, `StableDiffusion.guidance`. low_memory: for decoding, see `vae.py`.
    Raises InputError.
    """
    size = check_size(sd, size)
    sampler = check_sampler(sd, sampler, steps)
    if latents is None:
        shape = (sd.unet.cfg.in_channels, size // sd.downscale, size // sd.downscale)
        latents = draw_noise(seed, list(range(len(prompts))) if indices is None else indices, shape)
    height, width = (n * sd.downscale for n in latents.shape[2:])
    guidance_scale = sd.guidance if guidance_scale is None else guidance_scale
    epsilon = guided_epsilon(sd, prompts, guidance_scale, negative_prompt, height, width)
    z = latents.to(sd.device, torch.float32)  # fp32 whatever the network's dtype: sums of many small steps
    if sampler == "flow":
        velocity = reflow.as_velocity(epsilon, sd.alphas_cumprod, sd.windows, sd.prediction_type)
        z = reflow.euler(velocity, z, reflow.sampling_grid(steps, sd.windows))
    else:
        solve = {"ddim": reflow.ddim, "dpm++": reflow.dpm_solver}[sampler]
        z = solve(epsilon, z, sd.alphas_cumprod, torch.tensor(reflow.borders(steps)))
    return to_pixels(sd.decode(z, low_memory))


def to_pixels(images: Tensor) -> np.ndarray:
    """Pictures (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def processes() -> tuple[int, int]:
    """(rank, number) of this process among those that `torchrun` started; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(device: str | None) -> str:
    """The device that was asked for, if it can be used; else this process's GPU, or the CPU where there is none."""
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device} cannot be used here ({reason}); cpu always can") from None
    return device


def check_size(sd: StableDiffusion, size: int | None) -> int:
    if size is None:
        default = sd.unet.cfg.sample_size
        return (default if isinstance(default, int) else default[0]) * sd.downscale
    if size < sd.downscale or size % sd.downscale:
        raise InputError(f"size {size} does not fit: it must be a multiple of {sd.downscale} pixels")
    return size


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


def read_prompts(file: Path) -> list[str]:
    """One prompt per line; or from a COCO captions JSON, the first caption of each image, in the order of image ids."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            captions = {}
            for annotation in sorted(json.loads(text)["annotations"], key=lambda a: a["id"]):
                captions.setdefault(annotation["image_id"], annotation["caption"])
            prompts = [" ".join(captions[image].split()) for image in sorted(captions)]
        else:
            prompts = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts in {file}: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is not a COCO captions JSON: annotations with id, image_id, caption") from None
    if not prompts:
        raise InputError(f"{file} holds no prompts; write one per line")
    return prompts


def unlearned_words(sd: StableDiffusion, prompts: list[str]) -> list[str]:
    """Words that a model of small vocabulary has never seen. CLIP's official one spells rare words from common pieces,
    the miniature's has every word of its captions as one token and no other."""
    bpe = sd.tokenizers[0].bpe
    if bpe.get_vocab_size() > 5000:
        return []
    words = dict.fromkeys(word.strip(",.") for prompt in prompts for word in prompt.split())
    return [word for word in words if len(bpe.encode(word, add_special_tokens=False).ids) > 1]


def fingerprint(*weights: Tensor) -> str:
    """Tells a network from another of the same name, such as itself before it was trained on."""
    return hashlib.sha256(b"".join(w.detach().float().cpu().numpy().tobytes() for w in weights)).hexdigest()[:12]


def settings_of_png(file: Path) -> dict[str, str]:
    """The text chunk of one of our pictures; empty if there is none, or no readable picture."""
    try:
        with Image.open(file) as image:
            return dict(image.text)
    except (OSError, AttributeError, SyntaxError):
        return {}


def save_png(image: np.ndarray, file: Path, settings: dict[str, str]) -> None:
    """Write a picture with its settings in its text chunk, whole or not at all."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_itxt(name, value)
    Image.fromarray(image).save(file.with_suffix(".partial"), format="PNG", pnginfo=info)
    os.replace(file.with_suffix(".partial"), file)


def on_white(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB; what is transparent shows white."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def contact_sheet(images: list[np.ndarray], captions: list[str], columns: int) -> Image.Image:
    """All pictures on one, each over its caption; small ones enlarged."""
    height, width = images[0].shape[:2]
    zoom = max(1, 128 // width)
    cell, text = (width * zoom + 8, height * zoom + 8), 30
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + 8, rows * (cell[1] + text) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = 8 + i % columns * cell[0], 8 + i // columns * (cell[1] + text)
        sheet.paste(Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST), (x, y))
        lines = wrap(caption, lambda line: pen.textlength(line) <= width * zoom)
        pen.multiline_text((x, y + height * zoom + 2), "\n".join(lines[:2]), "black", spacing=1)
    return sheet


def wrap(text: str, fits) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer) or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def make_folder(folder: Path) -> None:
    """Make the folder for the results, and see that it can be written to: before the work, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None


def run(args: argparse.Namespace) -> None:
    rank, world = processes()
    prompts = read_prompts(args.prompts) if args.prompts else args.prompt
    make_folder(args.out)
    if args.n < 1 or args.batch_size < 1:
        raise InputError("--n and --batch-size must be at least 1")
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "float16"))
    sd = StableDiffusion.load(args.model, device, dtype, args.tokenizer)
    size, sampler = check_size(sd, args.size), check_sampler(sd, args.sampler, args.steps)
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

    if world > 1:  # the sheet needs everybody's pictures
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        shown = range(min(len(everything), 64))
        columns = args.n if 1 < args.n <= 8 else min(len(shown), 8)
        pictures = [np.array(Image.open(file_of[i])) for i in shown]
        sheet = contact_sheet(pictures, [everything[i] for i in shown], columns)
        sheet.save(args.out / "sheet.partial", format="PNG")
        os.replace(args.out / "sheet.partial", args.out / "sheet.png")
        made = f"{len(everything)} pictures, {args.steps} steps of {SAMPLERS[sampler]}, guidance {guidance:g}"
        print(f"{made}: {args.out}/00000.png ..., all on {args.out}/sheet.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make pictures of prompts.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", help="one or more prompts")
    source.add_argument("--prompts", type=Path, help="a file with a prompt per line, or a COCO captions JSON")
    parser.add_argument("--model", type=Path, default=FLOW, help="model folder, or single .safetensors file")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer(s), for a single file")
    parser.add_argument("--steps", type=int, default=4, help="network evaluations per picture (two with guidance)")
    parser.add_argument(
        "--guidance", type=float, help="classifier-free guidance scale, 1 for none; default: 4, or what the flow is for"
    )
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: flow for flows, ddim for diffusion models")
    parser.add_argument("--seed", type=int, default=0, help="picture i depends on (seed, i) alone")
    parser.add_argument("--n", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--size", type=int, help="height and width in pixels; default: the model's")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures made at once")
    parser.add_argument("--out", type=Path, default=Path("out/samples"), help="folder for pictures and sheet.png")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float16, on CPU float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: slow to start, then faster")
    parser.add_argument("--low-memory", action="store_true", help="decode in bands of rows: the same pictures")
    with checkpoint.one_line_errors(parser, "stopped; the same command goes on where it was"):
        run(parser.parse_args())


if __name__ == "__main__":
    main()
