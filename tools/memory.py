"""Memory and time of training SD1.5 at 512 and SDXL at 1024 pixels, by arithmetic (`support/memory.py`).

    python -m tools.memory                      two tables, for docs/real-models.md
    python -m tools.memory --measure            an update of SD1.5 at 256 pixels on this CPU, counted and measured
    python -m tools.memory --measure --lora 64  the same with LoRA

For a model and a command of your own: `train.py --dry-run`.
"""

import argparse
import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from clip_text import Tokenizer
from model import MINIATURE, NETWORKS, StableDiffusion
from support.errors import InputError, Parser, one_line_errors, positive_int
from support.latents import write_latents
from support.memory import GIB, TERA, count
from support.official import OFFICIAL, SD15
from support.weights import build, read_config
from unet import RECOMPUTED

SIZES = {"SD1.5": 512, "SDXL": 1024}
# Model, GPUs and their memory in GB, --batch-size, --accumulate, --lora
SETTINGS = """
SD1.5 1x8 4 8 64
SD1.5 1x12 8 4 64
SD1.5 1x24 8 4 0
SD1.5 8x8 4 8 64
SD1.5 8x12 8 4 64
SD1.5 8x24 8 4 0
SDXL 1x24 4 4 64
SDXL 1x48 8 2 64
SDXL 1x80 8 2 0
SDXL 8x24 4 4 64
SDXL 8x48 2 8 0
SDXL 8x80 8 2 0
"""


@functools.cache
def official(family: str) -> dict[str, nn.Module]:
    """Its networks, on `meta`."""
    settings = {name: OFFICIAL[family][name] for name in NETWORKS if name in OFFICIAL[family]}
    return {name: build(NETWORKS[name][0], read_config(NETWORKS[name][1], s, name)) for name, s in settings.items()}


@functools.cache
def count_official(family: str, batch: int, accumulate: int, rank: int, world: int, stage: int) -> tuple[dict, float]:
    args = SimpleNamespace(
        batch_size=batch, grad_accum_steps=accumulate, lora=rank, gradient_checkpointing=True, base=1, teacher=stage,
        solver_steps=4 if stage == 1 else 2, teacher_guidance=1, reuse=1,
    )  # fmt: skip
    shape = 4, SIZES[family] // 8, SIZES[family] // 8
    return count(official(family), shape, args, world, RECOMPUTED)


def print_parts(family: str) -> None:
    """GiB of a later stage by what they are for, at batch 8: all weights or an update of rank 64, 1 or 8 GPUs."""
    columns = [count_official(family, 8, 1, rank, world, 2)[0] for rank, world in ((0, 1), (0, 8), (64, 1), (64, 8))]
    print(f"{family}, GiB                                     1 GPU  8 GPUs  LoRA 64, 1 GPU  8 GPUs")
    for name in columns[2]:
        print(f"{name:46}" + "{:6.1f}{:8.1f}{:16.1f}{:8.1f}".format(*(c.get(name, 0) / GIB for c in columns)))
    print(f"{'in all':46}" + "{:6.1f}{:8.1f}{:16.1f}{:8.1f}".format(*(sum(c.values()) / GIB for c in columns)))


def print_settings() -> None:
    """What fits which GPU, and the hours of 10,000 updates at 400 TFLOP/s."""
    print("model  GPUs     options of train.py                        GiB  stage 1, hours  later stages")
    for line in SETTINGS.split("\n")[1:-1]:
        family, gpus, *numbers = line.split()
        batch, accumulate, rank = map(int, numbers)
        counts = [count_official(family, batch, accumulate, rank, int(gpus[0]), stage) for stage in (1, 2)]
        size = sum(counts[1][0].values()) / GIB
        hours = [10_000 * flop / (400 * TERA) / 3600 for _, flop in counts]
        options = f"--batch-size {batch} --accumulate {accumulate}" + (f" --lora {rank}" if rank else "")
        print(f"{family:6} {gpus + ' GB':8} {options:38} {size:7.1f}{hours[0]:16.1f}{hours[1]:14.1f}")


def measure(rank: int | None) -> None:
    """Random weights of SD1.5, random latents of 256 pixels, two forward passes in one update."""
    with tempfile.TemporaryDirectory() as folder:
        model, latents = Path(folder) / "model", Path(folder) / "latents"
        write_model(model)
        latents.mkdir()
        write_latents(latents / "0.safetensors", torch.randn(4, 4, 32, 32), torch.zeros(4, 4, 32, 32), ["a cat"] * 4)
        command = f"--windows 32 --teacher {model} --data {latents} --out {folder}/out --iters 1 --batch-size 1"
        command += " --accumulate 2 --sample-every 0 --save-every 9 --device cpu" + (f" --lora {rank}" if rank else "")
        for last in (["--dry-run"], []):
            done = subprocess.run([sys.executable, "-c", PEAK, *command.split(), *last])
            if done.returncode:
                raise InputError("the update did not end; is there enough memory?")


# Runs the trainer until its result would be written, and says how much memory of its own it had at most: without the
# pages of mapped files, which the system can drop.
PEAK = """
import threading, time
import train
from paper import variants
from support import memory, runs

def own():
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024 / memory.GIB

def watch():
    while True:
        sizes.append(own())
        time.sleep(0.02)

sizes = [own()]
threading.Thread(target=watch, daemon=True).start()
runs.save_checkpoint = train.save_flow = train.lora_files.write = lambda *_: None
train.lora.merged = lambda unet, update: unet
variants.main()
print(f"measured: {max(sizes) - sizes[0]:.2f} GiB more than before")
"""


def write_model(folder: Path) -> None:
    """SD1.5 with random weights in float16, and the miniature's few words."""
    tokenizer = Tokenizer.load(MINIATURE / "tokenizer")
    text = SD15["text_encoder"] | {"vocab_size": tokenizer.end + 1, "eos_token_id": tokenizer.end}
    configs, parts = SD15 | {"text_encoder": text}, {}
    for name in "unet", "vae", "text_encoder":
        network_class, config_class = NETWORKS[name]
        parts[name] = network_class(read_config(config_class, configs[name], name)).half()
    StableDiffusion(parts, [tokenizer], configs).save(folder)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run an update of SD1.5 and measure it")
    parser.add_argument("--lora", type=positive_int, help="rank of the update that is measured")
    args = parser.parse_args()
    with one_line_errors(parser):
        if args.measure:
            return measure(args.lora)
        for family in SIZES:
            print_parts(family)
        print_settings()


if __name__ == "__main__":
    main()
