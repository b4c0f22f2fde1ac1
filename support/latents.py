"""Latents of images that were encoded once, to be trained on many times (`tools/cache.py`)."""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from support.errors import InputError
from support.files import read_json, write_tensors
from support.folders import tensor_names
from support.images import is_hidden


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
