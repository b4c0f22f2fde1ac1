"""Speed and memory, always as a ratio to what people would use instead, measured in the same run.

    python bench.py load        load SD1.5 from a folder: seconds and peak memory, ours and diffusers'
    python bench.py data        pictures per second that one and two reader processes deliver, for each kind of data

Needs requirements-dev.txt for the peers. Weights are random; only shapes and dtypes matter here.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import convert
import data

# Each side runs in a process of its own, prints seconds to load, seconds until every weight was read once, peak bytes.
LOAD = {
    "ours": """
from model import StableDiffusion
def load():
    return StableDiffusion.load({folder!r}, dtype={dtype}).networks.values()
""",
    "diffusers": """
import diffusers
diffusers.utils.logging.disable_progress_bar()
def load():
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained({folder!r}, torch_dtype={dtype})
    return pipeline.unet, pipeline.vae, pipeline.text_encoder
""",
}
MEASURE = """
import json, time, torch
{imports}
def kilobytes(name):  # VmRSS: memory now, VmHWM: the most so far (Linux)
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = kilobytes("VmRSS")
start = time.perf_counter()
networks = load()
loaded = time.perf_counter() - start
total = sum(weight.sum().item() for network in networks for weight in network.parameters())
read = time.perf_counter() - start
size = sum(w.numel() * w.element_size() for network in networks for w in network.parameters())
peak = (kilobytes("VmHWM") - before) * 1024
print(json.dumps([loaded, read, peak / size]))
"""


def make_sd15(folder: Path, dtype: str) -> None:
    """SD1.5 with random weights, as diffusers writes it."""
    import diffusers
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    from clip_text import BEGIN, END

    def plain(name: str) -> dict:
        return {key: value for key, value in convert.SD15[name].items() if not key.startswith("_")}

    to = getattr(torch, dtype)
    diffusers.UNet2DConditionModel(**plain("unet")).to(to).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(**plain("vae")).to(to).save_pretrained(folder / "vae")
    text = transformers.CLIPTextConfig(**plain("text_encoder"))
    transformers.CLIPTextModel(text).to(to).save_pretrained(folder / "text_encoder")
    diffusers.DDIMScheduler(**plain("scheduler")).save_pretrained(folder / "scheduler")
    words = [*sorted(ByteLevel.alphabet()), *(f"word{i}" for i in range(49408 - 256 - 2)), BEGIN, END]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "model_index.json").write_text(json.dumps(convert.SD15["model_index"]))


def bench_load(args: argparse.Namespace) -> list[dict]:
    rows = []
    for stored, asked in (("float32", "float32"), ("float16", "float16"), ("float16", "float32")):
        folder = args.work / f"sd15-{stored}"
        if not (folder / "model_index.json").exists():
            make_sd15(folder, stored)
        results = {side: [] for side in LOAD}
        for _ in range(args.runs):  # alternating, so that both meet the same machine
            for side, imports in LOAD.items():
                code = MEASURE.format(imports=imports.format(folder=str(folder), dtype=f"torch.{asked}"))
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                results[side].append(json.loads(done.stdout))
        row = {"stored": stored, "asked": asked}
        for i, name in enumerate(("load", "load and read", "peak / weights")):
            ours, theirs = ([run[i] for run in results[side]] for side in LOAD)
            row[name] = {"ours": statistics.median(ours), "diffusers": statistics.median(theirs)}
            row[name] |= {"ratio": row[name]["ours"] / row[name]["diffusers"], "runs": [ours, theirs]}
            print(
                f"{stored} -> {asked}, {name}: ours {row[name]['ours']:.2f}, diffusers {row[name]['diffusers']:.2f}, "
                f"ratio {row[name]['ratio']:.2f}",
                flush=True,
            )
        rows.append(row)
    return rows


def make_pictures(folder: Path, count: int) -> None:
    """JPEGs of 768 x 576 with about the detail of a photograph (some 90 KB each), once as a folder, once as shards."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse, fine = (rng.integers(0, 256, (n * 3, n * 4, 3), np.uint8) for n in (6, 96))
        layers = [Image.fromarray(noise).resize((768, 576), Image.Resampling.BICUBIC) for noise in (coarse, fine)]
        Image.blend(*layers, 0.15).save(folder / f"files/{i:05d}.jpg", quality=90)
        (folder / f"files/{i:05d}.txt").write_text(f"picture number {i}")
    with tarfile.open(folder / "shards/00000.tar", "w") as tar:
        for file in sorted((folder / "files").iterdir()):
            tar.add(file, file.name)


def bench_data(args: argparse.Namespace) -> list[dict]:
    """How fast each kind of data comes, at SD1.5's size (512 pixels) and, for drawn scenes, at the miniature's."""
    folder, count, batch = args.work / "data", 400, 16
    if not folder.exists():
        aside = folder.with_suffix(".partial")
        for name in "files", "shards", "latents":
            (aside / name).mkdir(parents=True, exist_ok=True)
        make_pictures(aside, count)
        noise = torch.randn(2, count, 4, 64, 64)
        data.write_latents(aside / "latents/0.safetensors", *noise, ["a caption"] * count)
        aside.rename(folder)
    kinds = {name: data.open_source(folder / name, 512, augment=True) for name in ("files", "shards", "latents")}
    kinds["drawn scenes"] = data.Scenes(0)
    rows = []
    for name, source in kinds.items():
        row = {"data": name, "bytes per picture": None}
        if name != "drawn scenes":
            files = [file for file in (folder / name).iterdir() if file.suffix != ".txt"]
            row["bytes per picture"] = sum(file.stat().st_size for file in files) // count
        shape = (4, 8, 8) if name == "drawn scenes" else (4, 64, 64)
        for workers in 1, 2:
            rates = []
            for _ in range(args.runs):
                samples = data.Samples(source, 0, shape, [1000, 500, 0], points=1)
                batches = iter(data.batches(samples, 0, 60, batch, rank=0, world=1, workers=workers))
                for _ in range(10):  # the readers have started, and fetched a few batches ahead
                    next(batches)
                start = time.perf_counter()
                rates.append(sum(len(items["caption"]) for items in batches) / (time.perf_counter() - start))
            row[f"pictures/s, {workers} readers"] = round(statistics.median(rates))
        rows.append(row)
        print(
            ", ".join(f"{key}: {value if isinstance(value, str) else round(value or 0)}" for key, value in row.items())
        )
    return rows


BENCHES = {"load": bench_load, "data": bench_data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="where random models are kept (6 GB)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = BENCHES[args.what](args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
