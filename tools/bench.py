"""Speed and memory, always as a ratio to what people would use instead, measured in the same run.

    python bench.py load        load SD1.5 from a folder: seconds and peak memory, ours and diffusers'
    python bench.py data        images per second that one and two reader processes deliver, for each kind of data
    python bench.py networks    UNet and VAE at official sizes, ours and diffusers'
    python bench.py decode      1024 pixels in little memory: ours in bands of rows, diffusers' in tiles
    python bench.py text        the text encoder of SD1.5, ours and transformers'
    python bench.py pipeline    text to image at SD1.5's size, ours and diffusers'
    python bench.py start       process start to first image on the miniature, ours and a diffusers script
    python bench.py frechet     Frechet distance, ours and scipy.linalg.sqrtm's
    python bench.py limit       the UNet's operations per second, and of what kernels its time is made
    python bench.py step        a training iteration of a merging stage, and of PeRFlow's recipe
    python bench.py train       training SD1.5 and SDXL: evaluations per second, TFLOP/s, peak memory; needs a GPU
    python bench.py growth      sampling over steps, batch and size, training over processes, on the miniature
    python bench.py table       what was measured, into the README

Needs requirements-dev.txt for the peers. Weights are random; only shapes and dtypes matter here.
"""

import argparse
import ctypes
import functools
import importlib.metadata
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import fid
import reflow
import sample
import train
from clip_text import BEGIN, END, ClipText, ClipTextConfig
from model import MINIATURE, StableDiffusion, flow_scheduler, save_flow
from support import layouts
from support.files import write_between, write_json
from support.latents import write_latents
from support.runs import start_training
from support.weights import build, read_config
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

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


def random_model(family: dict, folder: Path, dtype: str) -> Path:
    """A folder of this family (of `layouts.OFFICIAL`) with random weights, as diffusers writes it; made once."""
    import diffusers
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    if (folder / "model_index.json").exists():
        return folder
    to = getattr(torch, dtype)
    diffusers.UNet2DConditionModel(**plain(family["unet"])).to(to).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(**plain(family["vae"])).to(to).save_pretrained(folder / "vae")
    diffusers.DDIMScheduler(**plain(family["scheduler"])).save_pretrained(folder / "scheduler")
    for text in [part for part in family if part.startswith("text_encoder")]:
        settings = family[text]
        network = getattr(transformers, settings["architectures"][0])(transformers.CLIPTextConfig(**settings))
        network.to(to).save_pretrained(folder / text)
        others = settings["vocab_size"] - 256 - 2
        words = [*sorted(ByteLevel.alphabet()), *(f"word{i}" for i in range(others)), BEGIN, END]
        tokenizer = folder / text.replace("text_encoder", "tokenizer")
        tokenizer.mkdir(exist_ok=True)
        (tokenizer / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (tokenizer / "merges.txt").write_text("#version: 0.2\n")
        special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
        write_json(tokenizer / "tokenizer_config.json", special | {"model_max_length": 77})
    (folder / "model_index.json").write_text(json.dumps(family["model_index"]))  # last: what it names is there
    return folder


def bench_load(args: argparse.Namespace) -> list[dict]:
    rows = []
    for stored, asked in (("float32", "float32"), ("float16", "float16"), ("float16", "float32")):
        folder = random_model(layouts.SD15, args.work / f"sd15-{stored}", stored)
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


def make_images(folder: Path, count: int) -> None:
    """JPEGs of 768 x 576 with about the detail of a photograph (some 90 KB each), once as a folder, once as shards."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse, fine = (rng.integers(0, 256, (n * 3, n * 4, 3), np.uint8) for n in (6, 96))
        layers = [Image.fromarray(noise).resize((768, 576), Image.Resampling.BICUBIC) for noise in (coarse, fine)]
        Image.blend(*layers, 0.15).save(folder / f"files/{i:05d}.jpg", quality=90)
        (folder / f"files/{i:05d}.txt").write_text(f"image number {i}")
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
        make_images(aside, count)
        noise = torch.randn(2, count, 4, 64, 64)
        write_latents(aside / "latents/0.safetensors", *noise, ["a caption"] * count)
        aside.rename(folder)
    kinds = {name: data.open_source(folder / name, 512, augment=True) for name in ("files", "shards", "latents")}
    kinds["drawn scenes"] = data.Scenes(0)
    rows = []
    for name, source in kinds.items():
        row = {"data": name, "bytes per image": None}
        if name != "drawn scenes":
            files = [file for file in (folder / name).iterdir() if file.suffix != ".txt"]
            row["bytes per image"] = sum(file.stat().st_size for file in files) // count
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
            row[f"images/s, {workers} readers"] = round(statistics.median(rates))
        rows.append(row)
        print(
            ", ".join(f"{key}: {value if isinstance(value, str) else round(value or 0)}" for key, value in row.items())
        )
    return rows


def compare(what: str, sides: dict[str, Callable[[], object]], runs: int, device: str) -> dict:
    """Seconds of ours and of a peer, and the memory that a call takes at its peak beyond what was taken before: once
    each to warm up, then in turns, so that both meet the same machine. The ratio is of the medians; the spread, the
    ratios of single runs."""
    seconds, peaks = {side: [] for side in sides}, {side: [] for side in sides}
    for run in range(runs + 1):
        for side, call in sides.items():
            before = memory(device, reset=True)[0]
            start = time.perf_counter()
            result = call()
            peak = memory(device)[1] - before  # on a GPU, this also waits for it
            if run:
                seconds[side].append(time.perf_counter() - start)
                peaks[side].append(peak)
            del result
    ours, peer = (statistics.median(times) for times in seconds.values())
    single = sorted(a / b for a, b in zip(*seconds.values()))
    row = {"what": what, "peer": list(sides)[1], "ours": ours, "theirs": peer, "ratio": ours / peer}
    row |= {"spread": [single[0], single[-1]], "runs": runs, "device": device, "threads": torch.get_num_threads()}
    row["peak MiB"] = [round(statistics.median(bytes_) / 2**20) for bytes_ in peaks.values()]
    print(
        f"{what}: ours {ours:.3f} s, {row['peer']} {peer:.3f} s, ratio {ours / peer:.2f} "
        f"({single[0]:.2f} to {single[-1]:.2f}), peak {row['peak MiB'][0]} and {row['peak MiB'][1]} MiB",
        flush=True,
    )
    return row


def memory(device: str, reset: bool = False) -> tuple[int, int]:
    """Bytes that are taken now, and the most that were since the last reset: the GPU's, or this process's (Linux)."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = dict(line.split()[:2] for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return int(kilobytes["VmRSS:"]) * 1024, int(kilobytes["VmHWM:"]) * 1024


def plain(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def bench_networks(args: argparse.Namespace) -> list[dict]:
    """UNet and VAE at SD1.5's and, on a GPU, SDXL's size, both sides with the very same random weights."""
    large = args.device.startswith("cuda")
    names, dtypes = (("SD1.5", "SDXL"), ("bfloat16",)) if large else (("SD1.5",), ("float32", "bfloat16"))
    rows = [row for name in names for dtype in dtypes for row in compare_unets(name, getattr(torch, dtype), args)]
    return rows + [compare_decoders(name, args) for name in names]


FAMILIES = {"SD1.5": (layouts.SD15, 64), "SDXL": (layouts.SDXL, 128)}  # configurations, and the size of latents


@torch.inference_mode()
def compare_unets(name: str, dtype: torch.dtype, args: argparse.Namespace) -> list[dict]:
    import diffusers

    family, size = FAMILIES[name]
    cfg = read_config(UNetConfig, family["unet"], "unet")
    with torch.device(args.device):
        theirs = diffusers.UNet2DConditionModel(**plain(family["unet"])).to(dtype).eval()
        x, text = torch.randn(2, 4, size, size, dtype=dtype), torch.randn(2, 77, cfg.cross_attention_dim, dtype=dtype)
        t, pooled, sizes = torch.tensor([999, 17]), torch.randn(2, 1280, dtype=dtype), torch.zeros(2, 6)
    ours = build(UNet, cfg)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    added = {"text_embeds": pooled, "time_ids": sizes}
    sides = {
        "ours": lambda: ours(x, t, text, pooled, sizes),
        "diffusers": lambda: theirs(x, t, text, added_cond_kwargs=added).sample,
    }
    what = f"UNet {name}, {str(dtype).removeprefix('torch.')}, batch 2"
    rows = [compare(what, sides, args.runs, args.device)]
    if args.compile:
        ours.compile(fullgraph=True)
        theirs.compile(fullgraph=True)
        rows.append(compare(f"{what}, compiled", sides, args.runs, args.device))
    return rows


@torch.inference_mode()
def compare_decoders(name: str, args: argparse.Namespace, low_memory: bool = False) -> dict:
    import diffusers

    family, size = FAMILIES[name]
    with torch.device(args.device):
        theirs = diffusers.AutoencoderKL(**plain(family["vae"])).eval()
        z = torch.randn(1, 4, size, size)
    ours = build(VAE, read_config(VAEConfig, family["vae"], "vae"))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    decode, what = ours.decode, f"VAE decode {name}, float32, {8 * size} pixels"
    if low_memory:
        theirs.enable_tiling()
        decode, what = functools.partial(ours), f"{what}, in little memory"
    sides = {"ours": lambda: decode(z), "diffusers": lambda: theirs.decode(z).sample}
    return compare(what, sides, args.runs, args.device)


def bench_decode(args: argparse.Namespace) -> list[dict]:
    return [compare_decoders("SDXL", args, low_memory=True)]


@torch.inference_mode()
def bench_text(args: argparse.Namespace) -> list[dict]:
    import transformers

    settings = layouts.SD15["text_encoder"]
    with torch.device(args.device):
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings)).eval()
        ids = torch.randint(1000, 40000, (16, 77))
    ours = build(ClipText, read_config(ClipTextConfig, settings, "text_encoder"))
    prefix = "" if next(iter(theirs.state_dict())).startswith("text_model.") else "text_model."
    ours.load_state_dict({prefix + name: weight for name, weight in theirs.state_dict().items()}, assign=True)
    sides = {"ours": lambda: ours(ids), "transformers": lambda: theirs(ids, output_hidden_states=True)}
    return [compare("text encoder CLIP ViT-L/14, float32, batch 16", sides, args.runs, args.device)]


def bench_pipeline(args: argparse.Namespace) -> list[dict]:
    """Text to image in four DDIM steps with guidance, at SD1.5's size; loading is not counted."""
    import diffusers

    folder = random_model(layouts.SD15, args.work / "sd15-float32", "float32")
    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    diffusers.utils.logging.disable_progress_bar()
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(args.device)
    theirs.set_progress_bar_config(disable=True)
    ours = StableDiffusion.load(folder, args.device, dtype)
    sides = {
        "ours": lambda: sample.generate(ours, ["word1 word2"], 4, 4.0),
        "diffusers": lambda: theirs("word1 word2", num_inference_steps=4, guidance_scale=4.0, output_type="np"),
    }
    return [compare("text to image, SD1.5, 4 steps", sides, args.runs, args.device)]


DIFFUSERS_SCRIPT = """
import diffusers, torch
diffusers.utils.logging.disable_progress_bar()
pipeline = diffusers.StableDiffusionPipeline.from_pretrained({folder!r}, torch_dtype=torch.float32)
pipeline("a red circle", num_inference_steps=4, guidance_scale=4.0).images[0].save({out!r})
"""


def bench_start(args: argparse.Namespace) -> list[dict]:
    """From the start of Python to the first image in a file, on the miniature."""
    out = args.work / "start"
    theirs = DIFFUSERS_SCRIPT.format(folder=str(MINIATURE), out=str(args.work / "start.png"))
    ours = ["sample.py", "--prompt", "a red circle", "--model", MINIATURE, "--out", out, "--device", args.device]

    def call(*arguments: object) -> None:
        shutil.rmtree(out, ignore_errors=True)  # else there would be nothing to do
        subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True)

    sides = {"ours": lambda: call(*ours), "diffusers": lambda: call("-c", theirs)}
    return [compare("process start to first image, miniature", sides, args.runs, "cpu")]


def bench_frechet(args: argparse.Namespace) -> list[dict]:
    """The Frechet distance at Inception's 2048 dimensions: ours, and by the matrix root that the formula names."""
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    one, two = ((x.mean(0), np.cov(x, rowvar=False)) for x in rng.standard_normal((2, 6000, 2048)) * rng.random(2048))

    def by_root() -> float:
        product = sqrtm(one[1] @ two[1])
        return np.sum((one[0] - two[0]) ** 2) + np.trace(one[1] + two[1] - 2 * product.real)

    sides = {"ours": lambda: fid.frechet_distance(*one, *two), "scipy.linalg.sqrtm": by_root}
    return [compare("Frechet distance, 2048 dimensions, 6,000 samples", sides, args.runs, "cpu")]


def bench_step(args: argparse.Namespace) -> list[dict]:
    """An iteration of a merging stage (two teacher steps) against PeRFlow's (eight), batch and networks equal."""
    windows, batch = 4, 64
    base, flow = (StableDiffusion.load(MINIATURE, args.device) for _ in range(2))
    flow.configs = flow.configs | {"scheduler": flow_scheduler(flow, 8)}
    student = StableDiffusion.load(MINIATURE, args.device).unet.requires_grad_(True)
    samples = data.Samples(data.Scenes(0), 0, (4, 8, 8), reflow.boundaries(windows), points=1)
    items = torch.utils.data.default_collate([samples[i] for i in range(batch)])
    prepared = train.prepare(base, items, torch.device(args.device))

    def step(teacher: StableDiffusion) -> None:
        steps = train.solver_steps(teacher, windows, None)
        train.loss_of(student, teacher, prepared, windows, steps, 0.1)[0].backward()
        student.zero_grad()

    sides = {"ours": lambda: step(flow), "PeRFlow's recipe": lambda: step(base)}
    return [compare("training iteration to 4 windows, miniature, batch 64", sides, args.runs, args.device)]


# Per GPU: images in a batch, and their size; with gradient checkpointing. The rest is what train.py does by default.
TRAINED = {"SD1.5": (layouts.SD15, 32, 512), "SDXL": (layouts.SDXL, 8, 1024)}
PEAK = {"H100": 989, "H200": 989, "A100": 312}  # TFLOP/s of dense bfloat16, as the maker says


def bench_train(args: argparse.Namespace) -> list[dict]:
    """Stages 1 and 2 as a user runs them, `train.py --recompute` on cached latents, with random weights. A backward
    pass counts as two forward passes, the second forward pass of recomputing not at all."""
    rows = []
    for name, (family, batch, pixels) in TRAINED.items():
        base, flops = random_model(family, args.work / f"train-{name}", "float16"), forward_flops(family, pixels)
        flow, latents = args.work / f"train-{name}-flow", args.work / f"latents-{pixels}"
        if not flow.exists():
            sd = StableDiffusion.load(base, dtype=None)
            save_flow(sd.unet, flow_scheduler(sd, 8), base, flow, torch.float16)
        if not latents.exists():
            aside = latents.with_suffix(".partial")
            aside.mkdir(exist_ok=True)
            shape = 2, 256, 4, pixels // 8, pixels // 8
            write_latents(aside / "0.safetensors", *torch.randn(shape), ["word1 word2"] * 256)
            aside.rename(latents)
        for stage, teacher in (1, base), (2, flow):
            command = ["--stage", stage, "--teacher", teacher, "--data", latents, "--size", pixels]
            line = logged([*command, "--batch-size", batch], args)
            teraflops = line["evaluations_per_second"] * flops / 1e12
            values = {"evaluations/s": line["evaluations_per_second"], "TFLOP/s": teraflops}
            if "peak_gib" in line:  # on a GPU
                gpu = torch.cuda.get_device_name()
                most = next((most for name, most in PEAK.items() if name in gpu), None)
                values |= {"GiB at the peak": line["peak_gib"]}
                values |= {"of the GPU's TFLOP/s": teraflops / most} if most else {}
            what = f"training {name}, stage {stage}, batch {batch}, {pixels} pixels, --recompute"
            rows.append({"what": what, "values": {unit: float(f"{value:.3g}") for unit, value in values.items()}})
            print(rows[-1], flush=True)
    return rows


def logged(command: list, args: argparse.Namespace) -> dict:
    """Line number --runs of the log of a training run, a mean over 5 updates; there the run ends."""
    run = args.work / "train/measured-run"
    shutil.rmtree(run, ignore_errors=True)
    command = [*command, "--name", "measured", "--out", run.parent, "--device", args.device, "--recompute"]
    command += ["--iters", 10_000, "--log-every", 5, "--save-every", 10_000, "--sample-every", 0]
    process = subprocess.Popen([sys.executable, *map(str, [train.__file__, *command])])
    lines = []
    while len(lines) < args.runs and process.poll() is None:
        time.sleep(0.2)
        lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
    if process.poll() is not None:
        sys.exit("train.py ended early, see above")
    process.kill()  # not interrupted: there is nothing to be saved
    process.wait()
    return json.loads(lines[args.runs - 1])


def forward_flops(family: dict, pixels: int) -> int:
    """Floating-point operations of the UNet's forward pass for one image: matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    cfg = read_config(UNetConfig, family["unet"], "unet")
    pooled = (cfg.projection_class_embeddings_input_dim or 0) - 6 * (cfg.addition_time_embed_dim or 0)
    shapes = (1, 4, pixels // 8, pixels // 8), (1,), (1, 77, cfg.cross_attention_dim), (1, pooled), (1, 6)
    with FlopCounterMode(display=False) as counter:
        build(UNet, cfg)(*(torch.empty(shape, device="meta") for shape in shapes))
    return counter.get_total_flops()


def bench_growth(args: argparse.Namespace) -> list[dict]:
    """How cost grows, on the miniature: one thing at a time, with all others as in `usual`. Medians of several runs."""
    sd, usual, rows = StableDiffusion.load(MINIATURE, args.device), {"steps": 4, "batch": 16, "pixels": 64}, []
    for name, values in {"steps": (1, 2, 4, 8, 16, 32), "batch": (1, 4, 16, 64), "pixels": (64, 128, 256)}.items():
        seconds = {}
        for value in values:
            at = usual | {name: value}
            prompts, times = ["a red circle"] * at["batch"], []
            for _ in range(args.runs + 1):
                start = time.perf_counter()
                sample.generate(sd, prompts, at["steps"], size=at["pixels"])
                times.append(time.perf_counter() - start)
            seconds[value] = round(1000 * statistics.median(times[1:]) / at["batch"], 2)
        rows.append({"what": f"sampling, {name}", "unit": "ms per image", "values": seconds})
        print(rows[-1], flush=True)
    shutil.rmtree(args.work / "growth", ignore_errors=True)
    rates = {}
    for processes in 1, 2:  # the same batch for each, so that twice as many samples pass with two
        command = ["--stage", 1, "--name", processes, "--out", args.work / "growth", "--device", args.device]
        command += ["--iters", 60, "--batch-size", 8, "--sample-every", 0]
        start_training(command, processes, threads=1, check=True, capture_output=True)
        log = (args.work / f"growth/{processes}-run/log.jsonl").read_text().splitlines()
        rates[processes] = round(json.loads(log[-1])["evaluations_per_second"])
    rows.append({"what": "training stage 1, processes of one thread", "unit": "evaluations/s", "values": rates})
    print(rows[-1], flush=True)
    return rows


# Parts of the names of operations that PyTorch's libraries do, the same for whoever calls them.
KERNELS = {"convolution": "% in convolutions", "mm": "% in products of matrices", "attention": "% in attention"}


@torch.inference_mode()
def bench_limit(args: argparse.Namespace) -> list[dict]:
    """How far SD1.5's UNet is from what the machine does at best, and how much of its time is anybody's to save."""
    gpu = args.device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    with torch.device(args.device):
        unet = UNet(read_config(UNetConfig, layouts.SD15["unet"], "unet")).to(dtype)
        x, text = torch.randn(2, 4, 64, 64, dtype=dtype), torch.randn(2, 77, 768, dtype=dtype)
        t, square = torch.tensor([999, 17]), torch.randn(4096, 4096, dtype=dtype)
    name = f"UNet SD1.5, {str(dtype).removeprefix('torch.')}, batch 2"
    sides = {"ours": lambda: unet(x, t, text), "a product of two matrices of 4096": lambda: square @ square}
    row = compare(name, sides, args.runs, args.device)
    flops = 2 * forward_flops(layouts.SD15, 512) / row["ours"], 2 * 4096**3 / row["theirs"]
    rates = {f"GFLOP/s{where}": round(rate / 1e9) for where, rate in zip(("", f" in {row['peer']}"), flops)}

    with torch.profiler.profile() as profile:
        sides["ours"]()
    times = dict.fromkeys([*KERNELS.values(), "% in all else"], 0.0)
    for event in (event for event in profile.key_averages() if event.key.startswith("aten::")):
        kind = next((kind for part, kind in KERNELS.items() if part in event.key), "% in all else")
        times[kind] += event.self_device_time_total if gpu else event.self_cpu_time_total
    shares = {kind: round(100 * time_ / sum(times.values()), 1) for kind, time_ in times.items()}
    return [{"what": name, "values": rates}, {"what": f"{name}, its time", "values": shares}]


RESULTS = Path(__file__).parent / "docs/results"
MARKS = "<!-- speed: python bench.py table -->\n", "<!-- end of speed -->"


def table() -> str:
    """What was measured last, docs/results/bench-*.json, as the README shows it."""
    lines = ["| what | peer | ours | peer's | ratio (single runs) | peak memory, ratio |", "|---|---|---|---|---|---|"]
    made = set()
    for file in sorted(RESULTS.glob("bench-*.json")):
        content = json.loads(file.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
        made.add(f"{content['gpu'] or content['cpu']}, {content['date']}, {versions}")
        for row in content["rows"]:
            low, high = row["spread"]
            lines.append(
                f"| {row['what']} | {row['peer']} | {row['ours']:.3g} s | {row['theirs']:.3g} s "
                f"| {row['ratio']:.2f} ({low:.2f} to {high:.2f}) | {peak_ratio(row)} |"
            )
    for file in filter(Path.exists, (RESULTS / f"{name}.json" for name in ("growth", "limit", "training"))):
        for row in json.loads(file.read_text())["rows"]:
            if "unit" in row:  # one thing at several values
                told = ", ".join(f"{value} at {at}" for at, value in row["values"].items())
                made.add(f"{row['what']}: {told} ({row['unit']})")
            else:
                made.add(f"{row['what']}: " + ", ".join(f"{value} {unit}" for unit, value in row["values"].items()))
    return "\n".join([*lines, "", *(f"- {line}" for line in sorted(made)), ""])


def peak_ratio(row: dict) -> str:
    ours, peers = row.get("peak MiB", (0, 0))
    return f"{ours / peers:.2f}" if peers > 10 else ""  # less is chance


def write_table(args: argparse.Namespace) -> list:
    readme = RESULTS.parent.parent / "README.md"
    write_between(readme, MARKS, table())
    return []


BENCHES = {
    "table": write_table,
    "load": bench_load,
    "data": bench_data,
    "networks": bench_networks,
    "decode": bench_decode,
    "text": bench_text,
    "pipeline": bench_pipeline,
}
BENCHES |= {"start": bench_start, "frechet": bench_frechet, "step": bench_step, "limit": bench_limit}
BENCHES |= {"growth": bench_growth, "train": bench_train}


def about() -> dict:
    """What the figures depend on besides the code."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "scipy")}
    return {"date": time.strftime("%Y-%m-%d"), "cpu": f"{len(names)} x {names[0]}", "gpu": gpu, "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="`networks`: also with torch.compile on both sides")
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="where random models are kept (6 GB)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = BENCHES[args.what](args)
    if args.json:
        args.json.write_text(json.dumps(about() | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
