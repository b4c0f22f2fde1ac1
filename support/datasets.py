"""Where captioned images come from: drawn scenes, a folder of images, tar shards, or latents encoded beforehand.

An item of a source has its `caption` and either `image` (3, H, W), fp32 in [-1, 1], or `mean` and `log_variance`
(4, h, w) of its latent's distribution. `data.py` puts items in order and adds what training draws for them.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from support import scenes
from support.captions import caption_of, decode, read_metadata, read_text
from support.errors import InputError
from support.images import LARGEST, find_files, find_images, read_image
from support.latents import Latents, latents_in
from support.shards import read_tables, shard_files, shards_in


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

    `where`: a folder of tar files, a text file that lists them, or a pattern, "laion/{00000..00059}.tar" or
    "laion/*.tar". At the start, only the headers in the tars are read.
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
