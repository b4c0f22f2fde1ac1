"""From files to networks: official configs and safetensors weights, checked strictly and loaded leanly.

A network is built on the `meta` device, where tensors have a shape but no memory, and then takes its weights from the
file as they are: nothing is initialized only to be overwritten. A tensor that needs no other dtype or device stays a
view of the mapped file, which the system reads when it is first used.

Read `model.py` first; this is what its `load` and `save` stand on. Where names differ, `layouts.py` knows.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from support.checks import ONLY
from support.errors import InputError
from support.files import listed

# Where a tensor of ours is found: its name in the file, and the way from the stored tensor to ours.
Source = tuple[str, Callable[[torch.Tensor], torch.Tensor]]

# Tensors beside a network's own: position counters, CLIP's training scale and vision tower, a VAE's training losses.
LEFT_OVER = re.compile(
    r"(^|\.)(position_ids|logit_scale|text_projection(\.weight)?|(vision_model|visual_projection|loss|model_ema)\..+)$"
)


def read_config(config_class: type, settings: dict, where: str):
    """Make `config_class` from a config.json's settings. One that we do not know or support is refused by name.

    null means "not used" in these files, and names that begin with "_" say who wrote it.
    """
    known = getattr(config_class, "ONLY", ONLY)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, value in settings.items():
        if value is None or name.startswith("_"):
            continue
        if name not in fields and name not in known:
            raise InputError(f"{where}: {name} = {value!r} is not supported: we do not know this setting")
        if name in fields and not fits(value, fields[name].type):
            raise InputError(f"{where}: {name} = {value!r} is not of the kind that this setting has")
        allowed = known.get(name, ...)
        if allowed is not ... and not all(part in as_tuple(allowed) for part in as_tuple(value)):
            only = " and ".join(map(repr, as_tuple(allowed)))
            raise InputError(f"{where}: {name} = {value!r} is not supported, only {only}")
    for name, field in fields.items():
        if settings.get(name) is None and field.default is dataclasses.MISSING:
            raise InputError(f"{where}: {name} is missing")
    try:
        return config_class(**{name: settings[name] for name in fields if settings.get(name) is not None})
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{where}: {error}") from None


def fits(value: object, kind: object) -> bool:
    """Is a value from a JSON file one of a field's type, such as `int | list[int]`? No number may be negative."""
    choices = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(fits(value, choice) for choice in choices)
    if choices:  # a list or tuple
        return isinstance(value, list | tuple) and all(fits(part, choices[0]) for part in value)
    if kind in (int, float):
        return type(value) in (int, kind) and 0 <= value < 10**9
    return isinstance(value, kind)


def as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def build(network_class: type[nn.Module], config, where: str = "config") -> nn.Module:
    """The network without its weights, frozen and in eval mode. Raises InputError."""
    try:
        with torch.device("meta"):
            return network_class(config).eval().requires_grad_(False)
    except Exception as error:  # torch has many ways to say that a size is impossible
        reason = str(error).partition("\n")[0]
        raise InputError(f"{where}: {reason}") from error


def assign(
    network: nn.Module,
    sources: dict[str, Source],
    files: dict[str, Path],
    device: str | torch.device,
    dtype: torch.dtype | None,
    where: str,
) -> None:
    """Give `network` its weights. `sources` says where each of its tensors is found, `files` where each found one is.

    Raises InputError if a tensor is missing, left over, or has another shape than the network's.
    """
    empty, state = network.state_dict(), {}
    compare(empty, sources, files, where)
    for file in set(files.values()):
        keys = sorted((key for key in empty if files[sources[key][0]] == file), key=lambda key: sources[key][0])
        # A few tensors at a time: where they have to be converted, the mapped pages they come from then leave memory.
        for i in range(0, len(keys), 24):
            with safe_open(file, framework="pt") as tensors:
                for key in keys[i : i + 24]:
                    name, view = sources[key]
                    state[key] = view(tensors.get_tensor(name)).reshape(empty[key].shape).to(device, dtype)
    network.load_state_dict(state, strict=True, assign=True)


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution, (out, in, 1, 1), is a linear layer, (out, in): files hold the one for the other."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def compare(empty: dict[str, torch.Tensor], sources: dict[str, Source], files: dict[str, Path], where: str) -> None:
    """Raise InputError unless `files` holds exactly the tensors that `empty` wants, in their shapes."""
    shapes, misshapen = {}, []
    for file in set(files.values()):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in files if files[name] == file}
    wanted = {name for name, _ in sources.values()}
    for key, (name, view) in sources.items():
        if name in shapes:
            try:
                found = tuple(view(torch.empty(shapes[name], device="meta")).shape)
            except (RuntimeError, IndexError):  # it cannot even be transposed or cut
                found = tuple(shapes[name])
            if without_ones(found) != without_ones(empty[key].shape):
                misshapen.append(f"{name} is {found}, should be {tuple(empty[key].shape)}")
    problems = {
        "missing": sorted(wanted - files.keys()),
        "that the network does not have": sorted(n for n in files.keys() - wanted if not LEFT_OVER.search(n)),
        "of another shape": misshapen,
    }
    if wrong := [f"{len(names)} {what} ({listed(names)})" for what, names in problems.items() if names]:
        raise InputError(f"{where}: the tensors do not fit the config: {'; '.join(wrong)}")
