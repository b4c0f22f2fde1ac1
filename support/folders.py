"""A model's folder: its settings, and which file each of its tensors is in. Weights have many file names: whole or in
shards, plain or of a variant such as `fp16`."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from support.errors import InputError
from support.files import read_json

STEMS = {  # how the weight files of a part are called
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip


def refuse_pickle(file: Path) -> None:
    if file.suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl"):
        raise InputError(f"{file} is a pickle, which can run any code when opened; get the model's .safetensors file")


def read_header(file: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors in a safetensors file, and its metadata; only the header is read."""
    refuse_pickle(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys()), tensors.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; check the path") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged, truncated or no safetensors file ({error}); fetch it again") from None


def tensor_names(file: Path) -> list[str]:
    return read_header(file)[0]


# Weight files and indices of shards, of a variant ("fp16", "bf16", "v0-fix"...) or of none. It has had four places.
WEIGHTS = r"{stem}(?:\.(.+?))?\.safetensors(?:(?:\.(.+?))?\.index(?:\.(.+?))?\.json)?"


def weight_files(folder: Path, stem: str) -> dict[str | None, Path]:
    """A folder's weight files, or indices of several, by their variant."""
    found = {}
    for file in sorted(folder.glob(f"{stem}*"), key=lambda file: (file.suffix == ".json", file.name)):
        match = re.fullmatch(WEIGHTS.format(stem=stem), file.name)
        if match and not re.search(r"-\d+-of-\d+\.", file.name):
            found.setdefault(match[1] or match[2] or match[3], file)
    return found


def find_tensors(folder: Path, stem: str, dtype: torch.dtype | None, variant: str | None = None) -> dict[str, Path]:
    """The tensors of a component's folder, and the file each of them is in: one file, or shards with an index.

    Of several variants, the wanted one is taken; else float16's for float16, where it loses nothing; else the plain
    file. Raises InputError.
    """
    found = weight_files(folder, stem)
    wanted = [variant, None, "fp16"] if variant or dtype != torch.float16 else ["fp16", None]
    choice = [name for name in wanted if name in found] or list(found)
    if not choice:
        for file in sorted(folder.glob("*")):
            refuse_pickle(file)
        raise InputError(f"{folder} has no weights: {stem}.safetensors is missing")
    if choice[0] not in wanted and len(found) > 1:
        raise InputError(f"{folder} has several variants; choose one with --variant: {', '.join(sorted(found))}")
    file = found[choice[0]]
    if file.suffix == ".safetensors":
        return dict.fromkeys(tensor_names(file), file)
    try:
        shards = [folder / shard for shard in sorted(set(read_json(file)["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{file} is no index: it has no weight_map of tensors to files; fetch it again") from None
    return {name: shard for shard in shards for name in tensor_names(shard)}


def read_folder(
    path: Path, dtype: torch.dtype | None, variant: str | None
) -> tuple[dict[str, dict], dict[str, dict[str, Path]]]:
    """(settings of a model folder's parts, tensors of each of its networks)."""
    configs = {"model_index": read_json(path / "model_index.json")}
    configs["scheduler"] = read_json(path / "scheduler/scheduler_config.json")
    has_second = configs["model_index"].get("text_encoder_2") not in (None, [None, None])
    stems = {name: stem for name, stem in STEMS.items() if name != "text_encoder_2" or has_second}
    configs |= {name: read_json(path / name / "config.json") for name in stems}
    if variant and not any(variant in weight_files(path / name, stem) for name, stem in stems.items()):
        raise InputError(f"{path} has no weights of variant {variant!r}; leave --variant out, or look at its files")
    return configs, {
        name: find_tensors(path / name, stem, kept_dtype(dtype, name, configs[name]), variant)
        for name, stem in stems.items()
    }


def kept_dtype(dtype: torch.dtype | None, name: str, config: dict) -> torch.dtype | None:
    """The dtype that a network is kept in when `dtype` is asked for. A VAE overflows in float16 unless its config
    denies it: the official libraries take `force_upcast` for true where it is left out."""
    overflows = name == "vae" and config.get("force_upcast") is not False
    return torch.float32 if dtype == torch.float16 and overflows else dtype
