"""Captioned images to train on, in an order that depends on a seed and nothing else.

Training sees sample number 0, 1, 2, ... without end. Which image that is, and all the chance that goes with it,
follows from (seed, number) alone: not from the number of processes, nor from how often the run was interrupted. So the
number of samples seen is all that a checkpoint has to remember, and two processes train on what one would have.

A source is a `Dataset` of images (3, H, W) in [-1, 1], or of latents, each with its caption: drawn scenes, a folder
of images, tar shards, or latents, which are made once:

    python -m tools.cache --out out/latents                                      of drawn scenes
    torchrun --nproc-per-node 8 -m tools.cache --model DIR --data DIR --out DIR  of images, by 8 processes

Read `train.py` next.
"""

import io
import json
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import reflow
from support import scenes
from support.captions import read_index
from support.devices import rank_and_world
from support.errors import InputError
from support.files import write_tensors
from support.folders import tensor_names
from support.images import SUFFIXES, on_white
from support.shards import read_table, shard_files
from support.streams import CROP, NOISE, ORDER, POSTERIOR, TIME, UNCOND, stream


class Scenes(Dataset):
    """The miniature's drawn scenes, without end: item i is scene i of the seed."""

    endless = True

    def __init__(self, seed: int):
        self.seed = seed
        self.name = f"drawn scenes, seed {seed}"

    def __getitem__(self, i: int) -> dict:
        image, caption = scenes.sample(self.seed, i)
        return {"image": torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1, "caption": caption}


class Images(Dataset):
    """Captioned images of any kind and size; a subclass knows where they are: `__len__`, `name_of` and `find`.

    Each is turned upright (EXIF), made RGB (over white, where it is transparent), resized to `size` along its shorter
    side and cropped to a square: in the middle, or with `augment` at a random place, and mirrored half of the time.
    time_ids (6,) are SDXL's: height and width before that, top and left of the crop, height and width after.
    An image that cannot be read, or has no caption, is named on stderr, and the next one takes its place; left_out
    is how many that were. InputError when they are more than 5% of all (and more than 10).
    """

    endless = False

    def __init__(self, size: int, augment: bool):
        self.size, self.augment, self.bad = size, augment, set()

    def __getitem__(self, i: int) -> dict:
        return self.item(i, None)

    def item(self, i: int, rng: np.random.Generator | None) -> dict:
        """Image i, cropped and mirrored by chance with `augment`."""
        place = rng.random(3) if self.augment else (0.5, 0.5, 1.0)
        known = len(self.bad)
        for at in (j % len(self) for j in range(i, i + len(self))):
            if at in self.bad:
                continue
            try:
                return self.read(at, *place) | {"left_out": len(self.bad) - known}
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                self.bad.add(at)
                print(f"notice: {self.name_of(at)} is left out: {error}", file=sys.stderr)
            if len(self.bad) > max(10, 0.05 * len(self)):
                break
        raise InputError(
            f"{len(self.bad)} of {len(self)} images cannot be used, the last {self.name_of(at)}; see above"
        )

    def read(self, i: int, down: float, right: float, mirror: float) -> dict:
        file, caption, size = self.find(i)
        caption = " ".join(caption.split())
        if not caption:
            raise ValueError("its caption is empty")
        with Image.open(file) as image:
            image = on_white(ImageOps.exif_transpose(image))
        width, height = image.size
        scale = self.size / min(width, height)
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        top, left = round(down * (image.height - self.size)), round(right * (image.width - self.size))
        pixels = np.array(image.crop((left, top, left + self.size, top + self.size)))
        if mirror < 0.5:
            pixels = pixels[:, ::-1].copy()
        return {
            "image": torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1,
            "caption": caption,
            "time_ids": torch.tensor([*(size or (height, width)), top, left, self.size, self.size]),
        }


class Folder(Images):
    """A folder tree of images, with captions in text files of the same names, or all in one `metadata.jsonl` whose
    lines have `file_name` and `text`."""

    def __init__(self, folder: Path, size: int, augment: bool = False):
        super().__init__(size, augment)
        self.name = f"{folder}, {size} pixels"
        index = folder / "metadata.jsonl"
        if index.exists():
            self.files, self.captions = read_index(index)
        else:
            self.files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
            self.captions = None  # read when needed: opening a million text files first takes long
        if not self.files:
            raise InputError(f"{folder} holds neither latents nor captioned images; check the path")

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, i: int) -> str:
        return str(self.files[i])

    def find(self, i: int) -> tuple[Path, str, None]:
        caption = self.captions[i] if self.captions else self.files[i].with_suffix(".txt").read_text(encoding="utf-8")
        return self.files[i], caption, None


class Shards(Images):
    """Tar files as img2dataset writes them: for every sample KEY.jpg, its caption in KEY.txt or else in KEY.json, and
    there the size that the image had before it was shrunk for the shard.

    `where`: a folder of tar files, a text file that lists them, or a pattern, "laion/{00000..00059}.tar" or
    "laion/*.tar". At the start only the headers in the tars are read. A tar that was cut short is named on stderr and
    used as far as it goes; InputError when there are more such than one, and than 5%.
    """

    def __init__(self, where: Path, size: int, augment: bool = False, buffer: int = 10_000):
        super().__init__(size, augment)
        self.name, self.buffer = f"{where}, {size} pixels", buffer
        self.files, tables, damaged = shard_files(where), [], []
        quiet = rank_and_world()[0] > 0
        for file in tqdm(self.files, desc="reading the shards' tables", leave=False, disable=quiet):
            table, error = read_table(file)
            tables.append(table)
            if error:
                damaged.append(file)
                notice = f"notice: {file} is damaged, its first {len(table)} samples are used: {error}"
                if not quiet:
                    print(notice, file=sys.stderr)
        if len(damaged) > max(1, 0.05 * len(self.files)):
            raise InputError(
                f"{len(damaged)} of {len(self.files)} shards are damaged, the last {damaged[-1]}; see above"
            )
        self.table = np.concatenate(tables)
        self.ends = np.cumsum([len(table) for table in tables])
        if not len(self.table):
            raise InputError(f"{where} holds no images; shards have KEY.jpg and KEY.txt for every sample")

    def __len__(self) -> int:
        return len(self.table)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """The samples in the order of an epoch: shard after shard, in random order, and each sample moved back by up to
        `buffer` places. That is what streaming through a shuffle buffer gives: the disk reads on and on, shards are
        opened one after the other; but here sample n can be found without reading the n before it."""
        starts = np.append(0, self.ends[:-1])
        streamed = np.concatenate([np.arange(starts[k], self.ends[k]) for k in rng.permutation(len(self.files))])
        return streamed[np.argsort(np.arange(len(self)) + rng.uniform(0, self.buffer, len(self)))]

    def file_of(self, i: int) -> Path:
        return self.files[int(np.searchsorted(self.ends, i, side="right"))]

    def name_of(self, i: int) -> str:
        file = self.file_of(i)
        at = int(self.table[i, 0])
        with open(file, "rb") as tar:
            tar.seek(at - 512)  # the header in front of the image begins with its name
            return f"{file}: {tar.read(100).rstrip(bytes(1)).decode(errors='replace')}"

    def find(self, i: int) -> tuple[io.BytesIO, str, tuple[int, int] | None]:
        with open(self.file_of(i), "rb") as tar:
            image, text, facts = (
                tar.seek(at) and tar.read(size) if at else None for at, size in self.table[i].reshape(3, 2).tolist()
            )
        facts = json.loads(facts) if facts else {}
        if not isinstance(facts, dict):
            raise ValueError("its JSON file holds no object")
        caption = text.decode() if text is not None else str(facts.get("caption") or "")
        size = facts.get("original_height"), facts.get("original_width")
        return io.BytesIO(image), caption, size if all(isinstance(n, int) for n in size) else None


class Latents(Dataset):
    """Images encoded beforehand: files with `mean` and `log_variance` (N, 4, h, w) of the VAE's distribution, not yet
    scaled, the captions, each as a row of UTF-8 bytes in `captions` (N, L), filled up with zeros, and where they are
    known the image sizes, `time_ids` (N, 6)."""

    endless = False

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise InputError(f"{folder} holds no latents (*.safetensors); check the path")
        self.parts = []
        for file in self.files:
            missing = {"mean", "log_variance", "captions"} - set(tensor_names(file))
            if missing:
                raise InputError(f"{file} holds no latents: {', '.join(sorted(missing))} missing")
            with safe_open(file, framework="pt") as tensors:
                self.parts.append({name: tensors.get_tensor(name) for name in tensors.keys()})
        self.ends = np.cumsum([len(part["mean"]) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict:
        part = int(np.searchsorted(self.ends, i, side="right"))
        item = {name: tensor[i - self.ends[part]] for name, tensor in self.parts[part].items()}
        caption = item.pop("captions").numpy().tobytes().rstrip(b"\0").decode()
        return item | {"mean": item["mean"].float(), "log_variance": item["log_variance"].float(), "caption": caption}


def open_source(where: Path | None, size: int, augment: bool = False) -> Dataset:
    """What is there: cached latents, tar shards, or a folder of images; drawn scenes if nothing is named."""
    if where is None:
        return Scenes(seed=0)
    if where.is_dir() and any(where.glob("*.safetensors")):
        return Latents(where)
    if where.is_dir() and not any(where.glob("*.tar")):
        return Folder(where, size, augment)
    return Shards(where, size, augment)


def write_latents(
    file: Path, mean: Tensor, log_variance: Tensor, captions: list[str], time_ids: Tensor | None = None
) -> None:
    """One file of `Latents`, whole or not at all."""
    rows = [caption.encode() for caption in captions]
    padded = np.zeros((len(rows), max(map(len, rows))), np.uint8)
    for row, encoded in zip(padded, rows):
        row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    tensors = {"mean": mean.half(), "log_variance": log_variance.half(), "captions": torch.from_numpy(padded)}
    if time_ids is not None:
        tensors["time_ids"] = time_ids
    write_tensors(file, tensors)


class Samples(Dataset):
    """Sample number n of a stage: an item of the source, and the random draws that training makes for it.

    noise (4, h, w) is where its trajectory starts; posterior (4, h, w) draws its latent from the VAE's distribution;
    tau is uniform in 1..1000, or with probability `starts` moved to the start of its window; uncond says that its
    caption is dropped. Each has its own stream, keyed by the stage's number of windows, too (`support/streams.py`).
    """

    def __init__(self, source: Dataset, seed: int, latent_shape: tuple[int, ...], windows: int, starts: float = 0.0):
        self.source, self.seed, self.shape, self.windows, self.starts = source, seed, latent_shape, windows, starts
        self.rising = np.array(reflow.boundaries(windows)[::-1])
        self.epoch, self.order = None, None

    def item(self, n: int) -> dict:
        if self.source.endless:
            return self.source[n]
        epoch, place = divmod(n, len(self.source))
        if epoch != self.epoch:  # every image once before any comes again, each time in another order
            self.epoch = epoch
            shuffle = stream(ORDER, self.seed, epoch, self.windows)
            shards = isinstance(self.source, Shards)
            self.order = self.source.order(shuffle) if shards else shuffle.permutation(len(self.source))
        i = int(self.order[place])
        if isinstance(self.source, Images):
            return self.source.item(i, stream(CROP, self.seed, n, self.windows))
        return self.source[i]

    def __getitem__(self, n: int) -> dict:
        time, noise, posterior, uncond = (
            stream(purpose, self.seed, n, self.windows) for purpose in (TIME, NOISE, POSTERIOR, UNCOND)
        )
        tau = time.integers(1, reflow.NOISE + 1)
        if time.random() < self.starts:
            tau = self.rising[np.searchsorted(self.rising, tau)]
        return self.item(n) | {
            "tau": int(tau),
            "noise": torch.from_numpy(noise.standard_normal(self.shape, np.float32)),
            "posterior": torch.from_numpy(posterior.standard_normal(self.shape, np.float32)),
            "uncond": bool(uncond.random() < 0.1),
        }


def batches(samples: Samples, first: int, count: int, size: int, rank: int, world: int, workers: int) -> DataLoader:
    """Batches number first, first + 1, ... of this process, `count` of them.

    Batch b of all processes together has the samples from b * world * size on; this one's share are `size` neighbors.
    """
    starts = range((first * world + rank) * size, ((first + count) * world + rank) * size, world * size)
    numbers = [range(start, start + size) for start in starts]
    return DataLoader(
        samples, batch_sampler=numbers, num_workers=workers, worker_init_fn=leave_signals_alone,
        pin_memory=torch.cuda.is_available(),  # from where a GPU fetches them beside its work
    )  # fmt: skip


def leave_signals_alone(worker: int) -> None:
    for which in (signal.SIGINT, signal.SIGTERM):  # they reach the whole job; ending it is the trainer's affair
        signal.signal(which, signal.SIG_IGN)
