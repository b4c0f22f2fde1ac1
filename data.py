"""Captioned pictures to train on, in an order that depends on a seed and nothing else.

Training sees sample number 0, 1, 2, ... without end. Which picture that is, and all the chance that goes with it,
follows from (seed, number) alone: not from the number of processes, nor from how often the run was interrupted. So the
number of samples seen is all that a checkpoint has to remember, and two processes train on what one would have.

A source is a `Dataset` of pictures (3, H, W) in [-1, 1], or of latents, each with its caption: drawn scenes, a folder
of pictures, tar shards, or latents, which are made once:

    python data.py cache --out out/latents                                 of drawn scenes, by the miniature's VAE
    torchrun --nproc-per-node 8 data.py cache --model DIR --data DIR       of pictures, by 8 processes

Read `train.py` next.
"""

import argparse
import glob
import io
import json
import os
import re
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
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


class Pictures(Dataset):
    """Captioned pictures of any kind and size; a subclass knows where they are: `__len__`, `name_of` and `find`.

    Each is turned upright (EXIF), made RGB (over white, where it is transparent), resized to `size` along its shorter
    side and cropped to a square: in the middle, or with `augment` at a random place, and mirrored half of the time.
    time_ids (6,) are SDXL's: height and width before that, top and left of the crop, height and width after.
    A picture that cannot be read, or has no caption, is named on stderr, and the next one takes its place; left_out
    is how many that were. InputError when they are more than 5% of all (and more than 10).
    """

    endless = False
    SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

    def __init__(self, size: int, augment: bool):
        self.size, self.augment, self.bad = size, augment, set()

    def __getitem__(self, i: int) -> dict:
        return self.item(i, None)

    def item(self, i: int, rng: np.random.Generator | None) -> dict:
        """Picture i, cropped and mirrored by chance with `augment`."""
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
            f"{len(self.bad)} of {len(self)} pictures cannot be used, the last {self.name_of(at)}; see above"
        )

    def read(self, i: int, down: float, right: float, mirror: float) -> dict:
        file, caption, size = self.find(i)
        caption = " ".join(caption.split())
        if not caption:
            raise ValueError("its caption is empty")
        with Image.open(file) as picture:
            picture = sample.on_white(ImageOps.exif_transpose(picture))
        width, height = picture.size
        scale = self.size / min(width, height)
        picture = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        top, left = round(down * (picture.height - self.size)), round(right * (picture.width - self.size))
        pixels = np.array(picture.crop((left, top, left + self.size, top + self.size)))
        if mirror < 0.5:
            pixels = pixels[:, ::-1].copy()
        return {
            "image": torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1,
            "caption": caption,
            "time_ids": torch.tensor([*(size or (height, width)), top, left, self.size, self.size]),
        }


class Folder(Pictures):
    """A folder tree of pictures, with captions in text files of the same names, or all in one `metadata.jsonl` whose
    lines have `file_name` and `text`."""

    def __init__(self, folder: Path, size: int, augment: bool = False):
        super().__init__(size, augment)
        self.name = f"{folder}, {size} pixels"
        index = folder / "metadata.jsonl"
        if index.exists():
            self.files, self.captions = read_index(index)
        else:
            self.files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in self.SUFFIXES)
            self.captions = None  # read when needed: opening a million text files first takes long
        if not self.files:
            raise InputError(f"{folder} holds neither latents nor captioned pictures; check the path")

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, i: int) -> str:
        return str(self.files[i])

    def find(self, i: int) -> tuple[Path, str, None]:
        caption = self.captions[i] if self.captions else self.files[i].with_suffix(".txt").read_text(encoding="utf-8")
        return self.files[i], caption, None


def read_index(index: Path) -> tuple[list[Path], list[str]]:
    files, captions = [], []
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            files.append(index.parent / entry["file_name"])
            captions.append(entry["text"] + "")
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{index}, line {number}: not a JSON object with file_name and text") from None
    return files, captions


class Shards(Pictures):
    """Tar files as img2dataset writes them: for every sample KEY.jpg, its caption in KEY.txt or else in KEY.json, and
    there the size that the picture had before it was shrunk for the shard.

    `where`: a folder of tar files, a text file that lists them, or a pattern, "laion/{00000..00059}.tar" or
    "laion/*.tar". At the start only the headers in the tars are read. A tar that was cut short is named on stderr and
    used as far as it goes; InputError when there are more such than one, and than 5%.
    """

    def __init__(self, where: Path, size: int, augment: bool = False, buffer: int = 10_000):
        super().__init__(size, augment)
        self.name, self.buffer = f"{where}, {size} pixels", buffer
        self.files, tables, damaged = shard_files(where), [], []
        quiet = sample.processes()[0] > 0
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
            raise InputError(f"{where} holds no pictures; shards have KEY.jpg and KEY.txt for every sample")

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
            tar.seek(at - 512)  # the header in front of the picture begins with its name
            return f"{file}: {tar.read(100).rstrip(bytes(1)).decode(errors='replace')}"

    def find(self, i: int) -> tuple[io.BytesIO, str, tuple[int, int] | None]:
        with open(self.file_of(i), "rb") as tar:
            picture, text, facts = (
                tar.seek(at) and tar.read(size) if at else None for at, size in self.table[i].reshape(3, 2).tolist()
            )
        facts = json.loads(facts) if facts else {}
        if not isinstance(facts, dict):
            raise ValueError("its JSON file holds no object")
        caption = text.decode() if text is not None else str(facts.get("caption") or "")
        size = facts.get("original_height"), facts.get("original_width")
        return io.BytesIO(picture), caption, size if all(isinstance(n, int) for n in size) else None


def shard_files(where: Path) -> list[Path]:
    """The tar files that a folder, a list or a pattern means, all of which exist."""
    if where.is_dir():
        files = sorted(where.glob("*.tar"))
    elif where.suffix == ".txt" and where.is_file():
        files = [where.parent / line.strip() for line in where.read_text().splitlines() if line.strip()]
    elif span := re.search(r"\{(\d+)\.\.(\d+)\}", str(where)):
        first, last = span.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        files = [Path(str(where).replace(span.group(), n)) for n in numbers]
    else:
        files = [Path(file) for file in sorted(glob.glob(str(where)))]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise InputError(f"{missing[0] if missing else where} does not exist; check the path")
    return files


def read_table(file: Path) -> tuple[np.ndarray, object]:
    """(samples, 6) int64: where picture, text and facts of every sample begin and how long they are, 0 if there is no
    such; and what ended the reading too soon."""
    samples, error = {}, None
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition(".")
                column = 0 if f".{kind.lower()}" in Pictures.SUFFIXES else {"txt": 2, "json": 4}.get(kind)
                if member.isreg() and column is not None:
                    row = samples.setdefault(key, [0] * 6)
                    row[column : column + 2] = member.offset_data, member.size
            if tar.offset + 512 > file.stat().st_size:  # tarfile takes a cut between two members for the end
                error = "it has no end"
    except (OSError, tarfile.TarError) as reason:
        error = reason
    rows = [row for row in samples.values() if row[0]]
    return np.array(rows, np.int64).reshape(-1, 6), error


class Latents(Dataset):
    """Pictures encoded beforehand: files with `mean` and `log_variance` (N, 4, h, w) of the VAE's distribution, not yet
    scaled, the captions, each as a row of UTF-8 bytes in `captions` (N, L), filled up with zeros, and where they are
    known the picture sizes, `time_ids` (N, 6)."""

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
    """What is there: cached latents, tar shards, or a folder of pictures; drawn scenes if nothing is named."""
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
    checkpoint.write_tensors(file, tensors)


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
    rank, world = sample.processes()
    weight = vae.encoder.conv_in.weight
    shards = range(rank, -(-count // shard), world)
    files = {k: folder / f"{k:05d}.safetensors" for k in shards}
    todo = [k for k in shards if not files[k].exists()]
    aside = folder / f"made_of-{rank}.partial"
    checkpoint.write_json(aside, made_of)
    os.replace(aside, folder / "made_of.json")
    total = sum(min(shard, count - k * shard) for k in todo)
    with tqdm(total=total, desc="encoding", disable=rank > 0) as bar:
        for k in todo:
            numbers = range(k * shard, min((k + 1) * shard, count))
            parts, captions, sizes = [], [], []
            for batch in DataLoader(Subset(source, numbers), batch_size=50, num_workers=workers):
                with torch.no_grad():
                    parts.append([part.cpu() for part in vae.encode(batch["image"].to(weight))])
                captions += batch["caption"]
                sizes += [batch["time_ids"]] if "time_ids" in batch else []
                bar.update(len(batch["caption"]))
            mean, log_variance = (torch.cat(part) for part in zip(*parts))
            write_latents(files[k], mean, log_variance, captions, torch.cat(sizes) if sizes else None)


def fingerprint(vae: VAE) -> str:
    return sample.fingerprint(vae.encoder.conv_in.weight, vae.quant_conv.weight)


class Samples(Dataset):
    """Sample number n of a training run: an item of the source, and the draws that training makes for it.

    noise (4, h, w) starts its path; posterior (4, h, w) draws its latent from the VAE's distribution; tau (points,)
    lie in one window of the path, the first uniform in 1..1000, and each, with the probability `starts`, is moved to
    the window's start; dropped says that its caption is left out.
    """

    def __init__(
        self,
        source: Dataset,
        seed: int,
        latent_shape: tuple[int, ...],
        windows: list[int],
        points: int,
        starts: float = 0.0,
    ):
        self.source, self.seed, self.shape, self.points, self.starts = source, seed, latent_shape, points, starts
        self.borders = np.array(windows[::-1])
        self.epoch, self.order = None, None

    def item(self, n: int, rng: np.random.Generator) -> dict:
        if self.source.endless:
            return self.source[n]
        epoch, place = divmod(n, len(self.source))
        if epoch != self.epoch:  # every picture once before any comes again, each time in another order
            self.epoch = epoch
            shuffle = np.random.default_rng((self.seed, epoch, 1))
            shards = isinstance(self.source, Shards)
            self.order = self.source.order(shuffle) if shards else shuffle.permutation(len(self.source))
        i = int(self.order[place])
        return self.source.item(i, rng) if isinstance(self.source, Pictures) else self.source[i]

    def __getitem__(self, n: int) -> dict:
        rng = np.random.default_rng((self.seed, n))
        first = rng.integers(1, self.borders[-1] + 1)
        k = np.searchsorted(self.borders, first)
        others = rng.integers(self.borders[k - 1] + 1, self.borders[k] + 1, self.points - 1)
        draws = {
            "tau": torch.from_numpy(np.append(first, others)),
            "noise": torch.from_numpy(rng.standard_normal(self.shape, np.float32)),
            "posterior": torch.from_numpy(rng.standard_normal(self.shape, np.float32)),
            "dropped": bool(rng.random() < 0.1),
        }
        draws["tau"][torch.from_numpy(rng.random(self.points) < self.starts)] = int(self.borders[k])
        return self.item(n, rng) | draws


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["cache"], help="cache: encode pictures once, for train.py --data")
    parser.add_argument("--model", type=Path, default=sample.MINIATURE, help="whose VAE encodes")
    parser.add_argument("--out", type=Path, default=Path("out/latents"), help="folder of the latents")
    parser.add_argument("--data", type=Path, help="folder of captioned pictures, or tar shards; default: drawn scenes")
    parser.add_argument("--size", type=int, help="height and width in pixels; default: the model's")
    parser.add_argument("--count", type=int, help="how many pictures; default: all of the folder, 100,000 scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn scenes")
    parser.add_argument("--workers", type=int, default=0, help="processes that make pictures")
    args = parser.parse_args()
    with checkpoint.one_line_errors(parser, "stopped; the same command goes on where it was"):
        sd = StableDiffusion.load(args.model, "cpu", None)
        source = open_source(args.data, sample.check_size(sd, args.size)) if args.data else Scenes(args.seed)
        if isinstance(source, Latents):
            raise InputError(f"{args.data} holds latents already")
        most = len(source) if args.data else sys.maxsize
        count = args.count or (most if args.data else 100_000)
        if not 0 < count <= most or args.count == 0:
            raise InputError(f"--count must be from 1 to {most}, not {args.count}")
        cache(sd.vae.to(sample.choose_device(None), torch.float32), source, count, args.out, workers=args.workers)


if __name__ == "__main__":
    main()
