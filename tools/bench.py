"""Speed, as a ratio to what people would use instead, measured in the same run.

    python -m tools.bench networks    UNet and VAE at official sizes, against diffusers
    python -m tools.bench pipeline    text to image at SD1.5's size, against diffusers
    python -m tools.bench frechet     Frechet distance, against scipy.linalg.sqrtm
    python -m tools.bench step        a training step of a merging stage, against PeRFlow's, on the miniature

Needs requirements-dev.txt for the peers. Weights are random: only shapes and dtypes matter here. How fast training
is, the `log.jsonl` of a run says.
"""

import argparse
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from scipy.linalg import sqrtm

import data
import fid
import sample
import train
from clip_text import Tokenizer
from model import MINIATURE, NETWORKS, StableDiffusion, flow_scheduler
from support import datasets, layouts
from support.devices import choose_device
from support.files import write_json
from support.weights import build, read_config
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

FAMILIES = {"SD1.5": (layouts.SD15, 64), "SDXL": (layouts.SDXL, 128)}  # configurations, and the size of latents


def compare(what: str, sides: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict:
    """Seconds of ours and of a peer: once each to warm up, then in turns, so that both meet the same machine. The ratio
    is of medians; the spread, of single runs."""
    seconds = {side: [] for side in sides}
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    for run in range(args.runs + 1):
        for side, call in sides.items():
            start = time.perf_counter()
            call()
            wait()
            if run:
                seconds[side].append(time.perf_counter() - start)
    ours, peer = (statistics.median(times) for times in seconds.values())
    single = sorted(a / b for a, b in zip(*seconds.values()))
    row = {"what": what, "peer": list(sides)[1], "ours": ours, "theirs": peer, "ratio": ours / peer}
    row |= {"spread": [single[0], single[-1]], "runs": args.runs, "device": args.device}
    return row | {"threads": torch.get_num_threads()}


def bench_networks(args: argparse.Namespace) -> list[dict]:
    """UNet and VAE at SD1.5's and, on a GPU, SDXL's size; both sides have the same random weights."""
    on_gpu = args.device.startswith("cuda")
    names, dtypes = (["SD1.5", "SDXL"], ["bfloat16"]) if on_gpu else (["SD1.5"], ["float32", "bfloat16"])
    unets = [compare_unets(name, dtype, args) for name in names for dtype in dtypes]
    return unets + [compare_decoders(name, args) for name in names]


@torch.inference_mode()
def compare_unets(name: str, dtype: str, args: argparse.Namespace) -> dict:
    family, size = FAMILIES[name]
    to = {"device": args.device, "dtype": getattr(torch, dtype)}
    theirs = diffusers.UNet2DConditionModel.from_config(family["unet"]).to(**to).eval()
    ours = build(UNet, read_config(UNetConfig, family["unet"], "unet"))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x, text = torch.randn(2, 4, size, size, **to), torch.randn(2, 77, ours.cfg.cross_attention_dim, **to)
    t, pooled, sizes = torch.tensor([999, 17]).to(args.device), torch.randn(2, 1280, **to), torch.zeros(2, 6, **to)
    sides = {"ours": lambda: ours(x, t, text, pooled, sizes)}
    added = {"text_embeds": pooled, "time_ids": sizes}
    sides["diffusers"] = lambda: theirs(x, t, text, added_cond_kwargs=added).sample
    return compare(f"UNet {name}, {dtype}, batch 2", sides, args)


@torch.inference_mode()
def compare_decoders(name: str, args: argparse.Namespace) -> dict:
    family, size = FAMILIES[name]
    theirs = diffusers.AutoencoderKL.from_config(family["vae"]).to(args.device).eval()
    ours = build(VAE, read_config(VAEConfig, family["vae"], "vae"))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    z = torch.randn(1, 4, size, size, device=args.device)
    sides = {"ours": lambda: ours.decode(z), "diffusers": lambda: theirs.decode(z).sample}
    return compare(f"VAE decode {name}, float32, {8 * size} pixels", sides, args)


def bench_pipeline(args: argparse.Namespace) -> list[dict]:
    """Text to image in four DDIM steps with guidance, at SD1.5's size; loading is not counted."""
    tokenizer = Tokenizer.load(MINIATURE / "tokenizer")
    text_settings = layouts.SD15["text_encoder"] | {"vocab_size": tokenizer.end + 1, "eos_token_id": tokenizer.end}
    configs, networks = layouts.SD15 | {"text_encoder": text_settings}, {}
    for name in "unet", "vae", "text_encoder":
        network_class, config_class = NETWORKS[name]
        networks[name] = network_class(read_config(config_class, configs[name], name))
    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusion(networks, [tokenizer], configs).save(folder)
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(args.device)
        ours = StableDiffusion.load(folder, args.device, dtype)
    theirs.set_progress_bar_config(disable=True)
    sides = {
        "ours": lambda: sample.generate(ours, ["a red circle"], 4, 4.0),
        "diffusers": lambda: theirs("a red circle", num_inference_steps=4, guidance_scale=4.0, output_type="np"),
    }
    return [compare("text to image, SD1.5, 4 steps", sides, args)]


def bench_frechet(args: argparse.Namespace) -> list[dict]:
    """The Frechet distance at Inception's 2048 dimensions: ours, and by the matrix root that the formula names."""
    args.device, rng = "cpu", np.random.default_rng(0)
    one, two = ((x.mean(0), np.cov(x, rowvar=False)) for x in rng.standard_normal((2, 6000, 2048)) * rng.random(2048))

    def by_root() -> float:
        root = sqrtm(one[1] @ two[1])
        return np.sum((one[0] - two[0]) ** 2) + np.trace(one[1] + two[1] - 2 * root.real)

    sides = {"ours": lambda: fid.frechet_distance(*one, *two), "scipy.linalg.sqrtm": by_root}
    return [compare("Frechet distance, 2048 dimensions, 6,000 samples", sides, args)]


def bench_step(args: argparse.Namespace) -> list[dict]:
    """A step of a merging stage (two teacher steps) against PeRFlow's (eight); batch and networks are equal."""
    base, flow = (StableDiffusion.load(MINIATURE, args.device) for _ in range(2))
    flow.configs = flow.configs | {"scheduler": flow_scheduler(flow, 8)}
    student = StableDiffusion.load(MINIATURE, args.device).unet.requires_grad_(True)
    samples = data.Samples(datasets.Scenes(0), 0, (4, 8, 8), 4)
    items = torch.utils.data.default_collate([samples[i] for i in range(64)])
    batch = data.prepare(base, items, torch.device(args.device))

    def step(teacher: StableDiffusion) -> None:
        settings = argparse.Namespace(windows=4, solver_steps=train.solver_steps(teacher, 4))
        with torch.no_grad():
            trajectory = train.teacher_trajectory(teacher, student, batch, settings)
        train.compute_loss(student, teacher, batch, trajectory, 4, 0.1)[0].backward()
        student.zero_grad()

    sides = {"ours": lambda: step(flow), "PeRFlow's recipe": lambda: step(base)}
    return [compare("training step to 4 windows, miniature, batch 64", sides, args)]


BENCHES = {"networks": bench_networks, "pipeline": bench_pipeline, "frechet": bench_frechet, "step": bench_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--runs", type=int, default=5, help="times that each side is measured")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    args.device = choose_device(args.device)
    rows = BENCHES[args.what](args)
    print(json.dumps(rows, indent=1))
    if args.json:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "scipy")}
        about = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu.partition(": ")[2], "gpu": gpu, "versions": versions}
        write_json(args.json, about | {"rows": rows})


if __name__ == "__main__":
    main()
