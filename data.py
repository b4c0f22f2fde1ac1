"""Captioned pictures to train on, in an order that depends on a seed and nothing else.

Training sees sample number 0, 1, 2, ... without end. Which picture that is, and all the chance that goes with it,
follows from (seed, number) alone: not from the number of processes, nor from how often the run was interrupted. So the
number of samples seen is all that a checkpoint has to remember, and two processes train on what one would have.

A source is a `Dataset` of pictures (3, H, W) in [-1, 1], or of latents, each with its caption. Latents are made once:

    python data.py cache --out out/latents                     of 100,000 drawn scenes, by the miniature's VAE
    torchrun --nproc-per-node 8 data.py cache ...              the same by several processes

Read `train.py` next.
"""

import argparse
import os
import signal
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import checkpoint
import sample
import scenes
from checkpoint import InputError
from model import StableDiffusion
from vae import VAE


class Scenes(Dataset):
    """The miniature's drawn scenes, without end: item i is scene i of the seed."""

    endless = True

    def __init__(self, seed: int):
        self.seed = seed
        self.name = f"drawn scenes, seed {seed}"

    def __getitem__(self, i: int) -> dict:
        image, caption = scenes.sample(self.seed, i)
        return {"image": torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1, "caption": caption}


class Latents(Dataset):
    """Pictures encoded beforehand: files with `mean` and `log_variance` (N, 4, h, w) of the VAE's distribution, not yet
    scaled, and the captions, each as a row of UTF-8 bytes in `captions` (N, L), filled up with zeros."""

    endless = False

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise InputError(f"{folder} holds no latents (*.safetensors); check the path")
        self.parts = []
        for file in self.files:
            missing = {"mean", "log_variance", "captions"} - set(checkpoint.tensor_names(file))
            if missing:
                raise InputError(f"{file} holds no latents: {', '.join(sorted(missing))} missing")
            with safe_open(file, framework="pt") as tensors:
                self.parts.append([tensors.get_tensor(name) for name in ("mean", "log_variance", "captions")])
        self.ends = np.cumsum([len(mean) for mean, _, _ in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict:
        part = int(np.searchsorted(self.ends, i, side="right"))
        mean, log_variance, captions = (tensor[i - self.ends[part]] for tensor in self.parts[part])
        caption = captions.numpy().tobytes().rstrip(b"\0").decode()
        return {"mean": mean.float(), "log_variance": log_variance.float(), "caption": caption}


def write_latents(file: Path, mean: Tensor, log_variance: Tensor, captions: list[str]) -> None:
    """One file of `Latents`, whole or not at all."""
    rows = [caption.encode() for caption in captions]
    padded = np.zeros((len(rows), max(map(len, rows))), np.uint8)
    for row, encoded in zip(padded, rows):
        row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    tensors = {"mean": mean.half(), "log_variance": log_variance.half(), "captions": torch.from_numpy(padded)}
    checkpoint.write_tensors(file.with_suffix(".partial"), tensors)
    file.with_suffix(".partial").replace(file)


def cache(vae: VAE, source: Dataset, count: int, folder: Path, shard: int = 5000, workers: int = 0) -> None:
    """Encode the first `count` pictures into `folder`, one file for every `shard` of them.

    What is there already is not made again; under torchrun each process makes its share. Raises InputError where the
    folder holds something else: latents of another VAE, or of another number.
    """
    sample.make_folder(folder)
    made_of = {"vae": fingerprint(vae), "count": count, "shard": shard, "source": source.name}
    if (folder / "made_of.json").exists():
        before = checkpoint.read_json(folder / "made_of.json")
        if before != made_of:
            raise InputError(f"{folder} holds other latents ({before}, not {made_of}); choose another --out")
    elif any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds latents that do not say of what; choose another --out")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    weight = vae.encoder.conv_in.weight
    shards = range(rank, -(-count // shard), world)
    files = {k: folder / f"{k:05d}.safetensors" for k in shards}
    todo = [k for k in shards if not files[k].exists()]
    aside = folder / f"made_of-{rank}.partial"
    checkpoint.write_json(aside, made_of)
    os.replace(aside, folder / "made_of.json")
    bar = tqdm(total=len(todo) * shard, desc="encoding", disable=rank > 0)
    for k in todo:
        numbers = range(k * shard, min((k + 1) * shard, count))
        parts, captions = [], []
        for batch in DataLoader(Subset(source, numbers), batch_size=50, num_workers=workers):
            with torch.no_grad():
                parts.append([part.cpu() for part in vae.encode(batch["image"].to(weight))])
            captions += batch["caption"]
            bar.update(len(batch["caption"]))
        mean, log_variance = (torch.cat(part) for part in zip(*parts))
        write_latents(files[k], mean, log_variance, captions)


def fingerprint(vae: VAE) -> str:
    return sample.fingerprint(vae.encoder.conv_in.weight, vae.quant_conv.weight)


class Samples(Dataset):
    """Sample number n of a training run: an item of the source, and the draws that training makes for it.

    noise (4, h, w) starts its path; posterior (4, h, w) draws its latent from the VAE's distribution; tau (points,)
    lie in one window of the path, the first uniform in 1..1000; dropped says that its caption is left out.
    """

    def __init__(self, source: Dataset, seed: int, latent_shape: tuple[int, ...], windows: list[int], points: int):
        self.source, self.seed, self.shape, self.points = source, seed, latent_shape, points
        self.borders = np.array(windows[::-1])
        self.epoch, self.order = None, None

    def item(self, n: int) -> dict:
        if self.source.endless:
            return self.source[n]
        epoch, place = divmod(n, len(self.source))
        if epoch != self.epoch:  # every picture once before any comes again, each time in another order
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.source))
        return self.source[int(self.order[place])]

    def __getitem__(self, n: int) -> dict:
        rng = np.random.default_rng((self.seed, n))
        first = rng.integers(1, self.borders[-1] + 1)
        k = np.searchsorted(self.borders, first)
        others = rng.integers(self.borders[k - 1] + 1, self.borders[k] + 1, self.points - 1)
        return self.item(n) | {
            "tau": torch.from_numpy(np.append(first, others)),
            "noise": torch.from_numpy(rng.standard_normal(self.shape, np.float32)),
            "posterior": torch.from_numpy(rng.standard_normal(self.shape, np.float32)),
            "dropped": bool(rng.random() < 0.1),
        }


def batches(samples: Samples, first: int, count: int, size: int, rank: int, world: int, workers: int) -> DataLoader:
    """Batches number first, first + 1, ... of this process, `count` of them.

    Batch b of all processes together has the samples from b * world * size on; this one's share are `size` neighbors.
    """
    starts = range((first * world + rank) * size, ((first + count) * world + rank) * size, world * size)
    numbers = [range(start, start + size) for start in starts]
    return DataLoader(samples, batch_sampler=numbers, num_workers=workers, worker_init_fn=leave_signals_alone)


def leave_signals_alone(worker: int) -> None:
    for which in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they reach all processes of a job, and ending it is the trainer's affair
        signal.signal(which, signal.SIG_IGN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["cache"], help="cache: encode pictures once, for train.py --data")
    parser.add_argument("--model", type=Path, default=sample.MINIATURE, help="whose VAE encodes")
    parser.add_argument("--out", type=Path, default=Path("out/latents"), help="folder of the latents")
    parser.add_argument("--count", type=int, default=100_000, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn scenes")
    parser.add_argument("--workers", type=int, default=0, help="processes that make pictures")
    args = parser.parse_args()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        if args.count < 1:
            raise InputError(f"--count must be at least 1, not {args.count}")
        vae = StableDiffusion.load(args.model, "cpu", None).vae.to(device, torch.float32)
        cache(vae, Scenes(args.seed), args.count, args.out, workers=args.workers)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on where it was\n")


if __name__ == "__main__":
    main()
