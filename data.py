"""Captioned images to train on, in an order that depends on a seed and nothing else.

Training sees sample number 0, 1, 2, ... without end. Which image that is, and every random draw for it, follow from
(seed, number) alone: not from the number of processes, nor from interruptions. So the number of samples seen is all
that a checkpoint has to remember, and two processes train on what one would have.

A source is a `Dataset` of drawn scenes, a folder of images, tar shards, or latents, which are encoded beforehand:

    python -m tools.cache --out out/latents                                      of drawn scenes
    torchrun --nproc-per-node 8 -m tools.cache --model DIR --data DIR --out DIR  of images, by 8 processes

An item of a source has its `caption` and either `image` (3, H, W), fp32 in [-1, 1], or `mean` and `log_variance`
(4, h, w) of its latent's distribution. Batches have the same with a B in front.
Shapes: N items, B batch, H W pixels, h w latents, L bytes of a caption.

Read `train.py` next.
"""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import reflow
from support import scenes
from support.captions import caption_of, read_metadata
from support.errors import InputError
from support.files import decode, read_text
from support.images import LARGEST, find_files, find_images, read_image
from support.latents import Latents, latents_in
from support.loader import load
from support.shards import read_tables, shard_files, shards_in
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
    """Captioned images of any kind and size. A subclass knows where they are: `__len__`, `name_of` and `find`.

    Each is made RGB and upright, resized to `size` along its shorter side, and cropped to a square: in the middle, or
    with `augment` at a random place, and half of the time mirrored. time_ids (6,) are SDXL's: height and width before
    that, top and left of the crop, height and width after.
    An image that cannot be read, or has no caption, is named on stderr, and the next one takes its place; `left_out` is
    how many that were. Raises InputError when they are more than 10, and more than 5% of all.
    """

    endless = False

    def __init__(self, size: int, augment: bool):
        self.size, self.augment, self.bad = size, augment, set()

    def __getitem__(self, i: int) -> dict:
        return self.item(i, None)

    def item(self, i: int, rng: np.random.Generator | None) -> dict:
        """Image i, with `augment` cropped and mirrored as `rng` says."""
        place = rng.random(3) if self.augment else (0.5, 0.5, 1.0)
        known = len(self.bad)
        for at in (j % len(self) for j in range(i, i + len(self))):
            if at in self.bad:
                continue
            try:
                return self.read(at, *place) | {"left_out": len(self.bad) - known}
            except (OSError, ValueError, RecursionError) as error:
                self.bad.add(at)
                print(f"notice: {self.name_of(at)} is left out: {error}", file=sys.stderr)
            if len(self.bad) > max(10, 0.05 * len(self)):
                break
        raise InputError(
            f"{len(self.bad)} of {len(self)} images cannot be used, the last {self.name_of(at)}; see above"
        )

    def read(self, i: int, down: float, right: float, mirror: float) -> dict:
        file, caption, original = self.find(i)
        image = read_image(file, upright=True, on_white=True)
        width, height = image.size
        scale = self.size / min(width, height)
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        if mirror < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        top, left = round(down * (image.height - self.size)), round(right * (image.width - self.size))
        pixels = np.array(image.crop((left, top, left + self.size, top + self.size)))
        return {
            "image": torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1,
            "caption": caption_of(caption),
            "time_ids": torch.tensor([*(original or (height, width)), top, left, self.size, self.size]),
        }


class Folder(Images):
    """A folder tree of images. Their captions are in text files of the same names, or all in files `metadata.jsonl` or
    `metadata.csv`; then what these list is used, and nothing else."""

    def __init__(self, folder: Path, size: int, augment: bool = False):
        super().__init__(size, augment)
        self.name = f"{folder}, {size} pixels"
        self.files, self.captions = find_images(folder), {}
        for index in find_files(folder, ("metadata.jsonl", "metadata.csv").__contains__):
            self.captions |= read_metadata(index)
        if self.captions:
            unlisted = len(set(self.files) - self.captions.keys())
            if unlisted:
                print(f"notice: {unlisted} images in {folder} are in no metadata file: left out", file=sys.stderr)
            self.files = list(self.captions)

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, i: int) -> str:
        return str(self.files[i])

    def find(self, i: int) -> tuple[Path, object, None]:
        file = self.files[i]
        if self.captions:
            return file, self.captions[file], None
        texts = [file.with_suffix(ending) for ending in (".txt", ".TXT", ".caption")]
        return file, read_text(next(filter(Path.exists, texts), texts[0])), None


class Shards(Images):
    """Tar files as img2dataset writes them: for every sample KEY.jpg, its caption in KEY.txt or else in KEY.json, and
    there the size that the image had before it was shrunk for the shard.

    `where`: a folder of tar files, or a pattern, "laion/{00000..00059}.tar" or "laion/*.tar". At the start, only the
    headers in the tars are read.
    """

    def __init__(self, where: Path, size: int, augment: bool = False, buffer: int = 10_000):
        super().__init__(size, augment)
        self.name, self.buffer = f"{where}, {size} pixels", buffer
        self.files = shard_files(where)
        tables = read_tables(self.files)
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
        with open(file, "rb") as tar:
            tar.seek(int(self.table[i, 0]) - 512)  # the header in front of the image begins with its name
            return f"{file}: {tar.read(100).rstrip(bytes(1)).decode(errors='replace')}"

    def find(self, i: int) -> tuple[io.BytesIO, object, tuple[int, int] | None]:
        parts = self.table[i].reshape(3, 2).tolist()
        if max(size for _, size in parts) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST:,} bytes")
        with open(self.file_of(i), "rb") as tar:
            image, text, facts = (tar.seek(at) and tar.read(size) if at else None for at, size in parts)
        facts = json.loads(decode(facts)) if facts else {}
        if not isinstance(facts, dict):
            raise ValueError("its JSON file holds no object")
        caption = facts.get("caption") if text is None else decode(text)
        original = facts.get("original_height"), facts.get("original_width")
        return io.BytesIO(image), caption, original if all(isinstance(n, int) for n in original) else None


def open_source(where: Path | None, size: int, augment: bool = False) -> Dataset:
    """What is there: cached latents, tar shards, or a folder of images; drawn scenes if nothing is named."""
    is_folder = where is not None and where.is_dir()
    if where is None or is_folder and latents_in(where):
        if augment:
            raise InputError("--augment cannot change drawn scenes or latents, only images; leave it out")
        return Latents(where) if where else Scenes(seed=0)
    return Folder(where, size, augment) if is_folder and not shards_in(where) else Shards(where, size, augment)


class Samples(Dataset):
    """Sample number n of a stage: an item of the source, and the random draws that training makes for it.

    noise (4, h, w) is where its trajectory starts; posterior (4, h, w) draws its latent from the VAE's distribution;
    uncond says that its caption is dropped. tau is uniform in 1..1000. With probability `starts`, it is moved to the
    start of its window; the others leave out the last share `gap` of each window. Each of the four has its own stream,
    keyed by the stage's number of windows, too (`support/streams.py`).
    """

    def __init__(self, source: Dataset, seed: int, latent: tuple[int, ...], windows: int, starts=0.0, gap=0.0):
        self.source, self.seed, self.shape, self.windows = source, seed, latent, windows
        self.starts, self.gap = starts, gap
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
        start = self.rising[np.searchsorted(self.rising, tau)]
        share = 0 if time.random() < self.starts else 1 - self.gap
        tau = start - int((start - tau) * share)
        return self.item(n) | {
            "tau": int(tau),
            "noise": torch.from_numpy(noise.standard_normal(self.shape, np.float32)),
            "posterior": torch.from_numpy(posterior.standard_normal(self.shape, np.float32)),
            "uncond": bool(uncond.random() < 0.1),
        }


def batches(samples: Samples, first: int, count: int, size: int, rank: int, world: int, workers: int) -> Iterator[dict]:
    """Batches number first, first + 1, ... of this process, `count` of them.

    Batch b of all processes together has the samples from b * world * size on; this one's share are `size` neighbors.
    """
    starts = range((first * world + rank) * size, ((first + count) * world + rank) * size, world * size)
    return load(samples, [range(start, start + size) for start in starts], workers)
