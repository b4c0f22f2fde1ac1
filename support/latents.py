"""Latents of images that were encoded once, to be trained on many times (`tools/cache.py`)."""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from support.devices import rank_and_world
from support.errors import InputError
from support.files import fingerprint, make_folder, read_json, write_json, write_tensors
from support.folders import tensor_names
from support.images import is_hidden
from support.loader import load


class Latents(Dataset):
    """Files with `mean` and `log_variance` (N, 4, h, w) of the VAE's distribution, not yet scaled; `captions` (N, L),
    each a row of UTF-8 bytes, filled up with zeros; and where they are known the image sizes, `time_ids` (N, 6)."""

    endless = False

    def __init__(self, folder: Path):
        self.parts = []
        for file in latents_in(folder):
            missing = {"mean", "log_variance", "captions"} - set(tensor_names(file))
            if missing:
                raise InputError(f"{file} holds no latents: {', '.join(sorted(missing))} missing")
            with safe_open(file, framework="pt") as tensors:
                self.parts.append({name: tensors.get_tensor(name) for name in tensors.keys()})
        if not self.parts:
            raise InputError(f"{folder} holds no latents (*.safetensors); check the path")
        self.ends = np.cumsum([len(part["mean"]) for part in self.parts])
        note = folder / "made_of.json"
        if note.exists() and len(self) < (count := read_json(note).get("count", 0)):
            raise InputError(f"{folder} holds {len(self)} of {count} latents; repeat its tools.cache command")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict:
        part = int(np.searchsorted(self.ends, i, side="right"))
        item = {name: tensor[i - self.ends[part]] for name, tensor in self.parts[part].items()}
        caption = item.pop("captions").numpy().tobytes().rstrip(b"\0").decode()
        return item | {"mean": item["mean"].float(), "log_variance": item["log_variance"].float(), "caption": caption}


def latents_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if not is_hidden(file.name))


def write_latents(
    file: Path, mean: Tensor, log_variance: Tensor, captions: list[str], time_ids: Tensor | None = None
) -> None:
    """One file of `Latents`, whole or not at all."""
    rows = np.array([caption.encode() for caption in captions], "S")  # filled up with zeros
    tensors = {"mean": mean.half(), "log_variance": log_variance.half()}
    tensors["captions"] = torch.from_numpy(rows.view(np.uint8).reshape(len(rows), -1))
    write_tensors(file, tensors if time_ids is None else tensors | {"time_ids": time_ids})


def name_of(vae: nn.Module) -> str:
    """Tells a VAE from others."""
    return fingerprint(vae.encoder.conv_in.weight, vae.quant_conv.weight)


def check_vae(folder: Path, vae: nn.Module) -> None:
    """Raise InputError if the latents of `folder` are known to be of another VAE."""
    note = folder / "made_of.json"
    if note.exists() and read_json(note).get("vae") != name_of(vae):
        raise InputError(f"{folder} holds latents of another VAE; make them with this model: python -m tools.cache")


def cache(sd, source: Dataset, count: int, folder: Path, shard: int = 5000, workers: int = 0) -> None:
    """Encode the first `count` images by the VAE of `sd` into `folder`, one file for every `shard` of them.

    What is there already is not made again; under torchrun each process makes its share. Raises InputError where the
    folder holds something else: latents of another VAE, of other images, or of another number.
    """
    make_folder(folder)
    note = folder / "made_of.json"
    made_of = {"vae": name_of(sd.vae), "count": count, "shard": shard, "source": source.name}
    if note.exists():
        if (before := read_json(note)) != made_of:
            raise InputError(f"{folder} holds other latents ({before}, not {made_of}); choose another --out")
    elif any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds latents that do not say of what; choose another --out")
    rank, world = rank_and_world()
    write_json(aside := folder / f"made_of-{rank}.json", made_of)
    aside.replace(note)
    files = {k: folder / f"{k:05d}.safetensors" for k in range(rank, -(-count // shard), world)}
    todo = {k: range(k * shard, min((k + 1) * shard, count)) for k, file in files.items() if not file.exists()}
    with tqdm(total=sum(map(len, todo.values())), desc="encoding", disable=rank > 0) as bar:
        for k, numbers in todo.items():
            parts, captions, sizes = [], [], []
            for batch in load(source, [numbers[i : i + 16] for i in range(0, len(numbers), 16)], workers):
                parts.append([part.half().cpu() for part in sd.encode_moments(batch["image"])])
                captions += batch["caption"]
                sizes += [batch["time_ids"]] if "time_ids" in batch else []
                bar.update(len(batch["caption"]))
            mean, log_variance = (torch.cat(part) for part in zip(*parts))
            write_latents(files[k], mean, log_variance, captions, torch.cat(sizes) if sizes else None)
