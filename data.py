"""Captioned pictures to train on, in an order that depends on a seed and nothing else.

Training sees sample number 0, 1, 2, ... without end. Which picture that is, and all the chance that goes with it,
follows from (seed, number) alone: not from the number of processes, nor from how often the run was interrupted. So the
number of samples seen is all that a checkpoint has to remember, and two processes train on what one would have.

A source is a `Dataset` of pictures (3, H, W) in [-1, 1], or of latents, each with its caption. Read `train.py` next.
"""

import signal
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import checkpoint
import scenes
from checkpoint import InputError


class Scenes(Dataset):
    """The miniature's drawn scenes, without end: item i is scene i of the seed."""

    endless = True

    def __init__(self, seed: int):
        self.seed = seed

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
