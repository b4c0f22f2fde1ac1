"""Speed, as a ratio to what people would use instead, measured in the same run. Needs requirements-dev.txt.

    python -m tools.bench networks    UNet and VAE at official sizes, against diffusers
    python -m tools.bench pipeline    text to image at SD1.5's size, against diffusers
    python -m tools.bench frechet     Frechet distance, against scipy.linalg.sqrtm
    python -m tools.bench step        a training step of a merging stage, against PeRFlow's, on the miniature

Weights are random: only shapes and dtypes matter here. How fast training is, the `log.jsonl` of a run says.
"""

import argparse
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
from model import MINIATURE, NETWORKS, StableDiffusion
from support import datasets, official
from support.devices import choose_device
from support.files import write_json
from support.official import flow_scheduler
from support.weights import build, read_config

RUNS = 5
FAMILIES = {"SD1.5": (official.SD15, 64), "SDXL": (official.SDXL, 128)}  # configurations, and the size of latents


def compare(what: str, peer: str, ours: Callable[[], object], theirs: Callable[[], object], device: str):
    """Seconds of ours and of a peer: once each to warm up, then in turns, so that both meet the same machine. The ratio
    is of medians; the spread, of single runs."""
    seconds = [], []
    for run in range(RUNS + 1):
        for call, times in zip((ours, theirs), seconds):
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if run:
                times.append(time.perf_counter() - start)
    medians = [statistics.median(times) for times in seconds]
    single = sorted(a / b for a, b in zip(*seconds))
    row = {"what": what, "peer": peer, "ours": medians[0], "theirs": medians[1], "ratio": medians[0] / medians[1]}
    row |= {"spread": [single[0], single[-1]], "runs": RUNS, "device": device}
    return row | {"threads": torch.get_num_threads()}


@torch.inference_mode()
def bench_networks(device: str) -> list[dict]:
    """UNet and VAE at SD1.5's and, on a GPU, SDXL's size; both sides have the same random weights."""
    on_gpu, rows = device.startswith("cuda"), []
    for name in ["SD1.5", "SDXL"] if on_gpu else ["SD1.5"]:
        family, size = FAMILIES[name]
        for dtype in ["bfloat16"] if on_gpu else ["float32", "bfloat16"]:
            to = {"device": device, "dtype": getattr(torch, dtype)}
            unet, their_unet = pair("unet", diffusers.UNet2DConditionModel, family, **to)
            x, text = torch.randn(2, 4, size, size, **to), torch.randn(2, 77, unet.cfg.cross_attention_dim, **to)
            t, pooled = torch.tensor([999, 17], device=device), torch.randn(2, 1280, **to)
            sizes = torch.zeros(2, 6, **to)
            added = {"text_embeds": pooled, "time_ids": sizes}
            ours = partial(unet, x, t, text, pooled, sizes)
            theirs = partial(their_unet, x, t, text, added_cond_kwargs=added, return_dict=False)
            rows.append(compare(f"UNet {name}, {dtype}, batch 2", "diffusers", ours, theirs, device))
        vae, their_vae = pair("vae", diffusers.AutoencoderKL, family, device=device)
        z = torch.randn(1, 4, size, size, device=device)
        what = f"VAE decode {name}, float32, {8 * size} pixels"
        ours, theirs = partial(vae.decode, z), partial(their_vae.decode, z, return_dict=False)
        rows.append(compare(what, "diffusers", ours, theirs, device))
    return rows


def pair(part: str, peer_class: type, family: dict, **to) -> tuple:
    """Our network and the peer's, with the same random weights."""
    network_class, config_class = NETWORKS[part]
    theirs = peer_class.from_config(family[part]).to(**to).eval()
    ours = build(network_class, read_config(config_class, family[part], part))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours, theirs


def bench_pipeline(device: str) -> list[dict]:
    """Text to image in four DDIM steps with guidance, at SD1.5's size; loading is not counted."""
    tokenizer = Tokenizer.load(MINIATURE / "tokenizer")
    text_settings = official.SD15["text_encoder"] | {"vocab_size": tokenizer.end + 1, "eos_token_id": tokenizer.end}
    configs, networks = official.SD15 | {"text_encoder": text_settings}, {}
    for name in "unet", "vae", "text_encoder":
        network_class, config_class = NETWORKS[name]
        networks[name] = network_class(read_config(config_class, configs[name], name))
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusion(networks, [tokenizer], configs).save(folder)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
        sd = StableDiffusion.load(folder, device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    ours = partial(sample.generate, sd, ["a red circle"], 4, 4.0)
    theirs = partial(pipeline, "a red circle", num_inference_steps=4, guidance_scale=4.0, output_type="np")
    return [compare("text to image, SD1.5, 4 steps", "diffusers", ours, theirs, device)]


def bench_frechet(device: str) -> list[dict]:
    """The Frechet distance at Inception's 2048 dimensions: ours, and by the matrix root that the formula names."""
    rng = np.random.default_rng(0)
    one, two = ((x.mean(0), np.cov(x, rowvar=False)) for x in rng.standard_normal((2, 6000, 2048)) * rng.random(2048))

    def by_root() -> float:
        root = sqrtm(one[1] @ two[1])
        return np.sum((one[0] - two[0]) ** 2) + np.trace(one[1] + two[1] - 2 * root.real)

    ours = partial(fid.frechet_distance, *one, *two)
    return [compare("Frechet distance, 2048 dimensions, 6,000 samples", "scipy.linalg.sqrtm", ours, by_root, "cpu")]


def bench_step(device: str) -> list[dict]:
    """A step of a merging stage (two teacher steps) against PeRFlow's (eight); batch and networks are equal."""
    base, flow, student = (StableDiffusion.load(MINIATURE, device) for _ in range(3))
    flow.configs = flow.configs | {"scheduler": flow_scheduler(flow, 8)}
    student = student.unet.requires_grad_(True)
    samples = data.Samples(datasets.Scenes(0), 0, (4, 8, 8), 4)
    items = torch.utils.data.default_collate([samples[i] for i in range(64)])
    batch = data.prepare(base, items, torch.device(device))

    def step(teacher: StableDiffusion) -> None:
        settings = argparse.Namespace(windows=4, solver_steps=train.solver_steps(teacher, 4))
        with torch.no_grad():
            trajectory = train.teacher_trajectory(teacher, batch, settings)
        train.compute_loss(student, teacher, batch, trajectory, 4, 0.1)[0].backward()
        student.zero_grad()

    what = "training step to 4 windows, miniature, batch 64"
    return [compare(what, "PeRFlow's recipe", partial(step, flow), partial(step, base), device)]


BENCHES = {"networks": bench_networks, "pipeline": bench_pipeline, "frechet": bench_frechet, "step": bench_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    rows = BENCHES[args.what](choose_device(None))
    print(json.dumps(rows, indent=1))
    if args.json:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "scipy")}
        about = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu.partition(": ")[2], "gpu": gpu, "versions": versions}
        write_json(args.json, about | {"rows": rows})


if __name__ == "__main__":
    main()
