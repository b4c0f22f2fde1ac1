"""The file of a LoRA that makes a flow: `pytorch_lora_weights.safetensors`, which diffusers reads, too.

Its tensors are unet.LAYER.lora_A.weight and unet.LAYER.lora_B.weight. Its metadata has rank, scale, num_time_windows,
all of the flow's scheduler settings, and the fingerprint of the model that it was trained on.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from support.checks import check_scheduler
from support.errors import InputError
from support.files import listed, write_tensors
from support.folders import read_header
from support.runs import weights_in

NAME = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder


def write(folder: Path, update: dict[str, Tensor], scheduler: dict, base: str) -> None:
    """base: fingerprint of the model that the update was trained on."""
    facts = {
        "rank": str(len(next(iter(update.values())))), "scale": "1", "base": base, "scheduler": json.dumps(scheduler),
        "num_time_windows": str(scheduler["num_time_windows"]),
    }  # fmt: skip
    write_tensors(folder / NAME, {f"unet.{name}": weight.half() for name, weight in update.items()}, facts)


def read(file: Path, unet: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """(update, metadata) of a file, or of the one in a folder; its scale is made a number, its scheduler a dict.
    Raises InputError where it is damaged, or made for another kind of network."""
    file = file / NAME if file.is_dir() else file
    names, facts = read_header(file)
    others = [name for name in names if not re.fullmatch(r"unet\..+\.lora_[AB]\.weight", name)]
    if others or not names:
        found = listed(others) or "nothing"
        raise InputError(f"{file} holds {found}; only updates of the UNet are supported: unet.LAYER.lora_A.weight")
    update = {name.removeprefix("unet."): weight for name, weight in load_file(file).items()}
    layers, weights = sorted({name.rpartition(".lora_")[0] for name in update}), unet.state_dict()
    if misfits := [layer for layer in layers if not fits(layer, update, weights)]:
        raise InputError(f"{file} is an update of another build of UNet: see {listed(misfits)}")
    try:
        facts |= {"scale": float(facts["scale"]), "scheduler": dict(json.loads(facts["scheduler"]))}
    except (KeyError, ValueError, TypeError):
        raise InputError(
            f"{file} does not say which flow it makes; only files of train.py --lora are supported"
        ) from None
    check_scheduler(facts["scheduler"], file)
    return update, facts


def fits(layer: str, update: dict[str, Tensor], weights: dict[str, Tensor]) -> bool:
    """Whether both parts of a layer's update are there, in the shapes that its weight asks for."""
    nothing = torch.empty(0)
    w = weights.get(f"{layer}.weight", nothing)
    a, b = (update.get(f"{layer}.lora_{part}.weight", nothing) for part in "AB")
    return len(w) > 0 and a.shape[1:] == w.shape[1:] and b.shape == (len(w), len(a), *[1] * (w.dim() - 2))


def read_stage_before(args: argparse.Namespace, unet: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """(update, scheduler) of the teacher, for a run of `train.py --lora`: of the same base and rank."""
    file = args.teacher / NAME
    update, facts = read(file, unet)
    if facts.get("base") != weights_in(args.base):
        raise InputError(f"{file} was not trained on {args.base}; name the model that it was trained on: --model")
    if facts.get("rank") != str(args.lora):
        raise InputError(f"{file} is of rank {facts.get('rank')}, not {args.lora}; all stages have the same --lora")
    return update, facts["scheduler"]
