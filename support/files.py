"""Reading and writing files: JSON, text, tensors, folders. What is written appears whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.errors import InputError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no names and values in braces")
        return content
    except FileNotFoundError:
        raise InputError(f"{path} is missing; a model folder in the official layout has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); fetch the file again") from None


def refuse_pickle(path: Path) -> None:
    raise InputError(
        f"{path} is a pickle, which can run any code when it is opened; get the .safetensors file of the same model"
    )


def listed(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that other libraries read, too. It appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    try:
        # transformers reads a weight file only if its metadata says which framework wrote it
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, {"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)  # the library makes files that only their owner can read
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    aside = path.with_suffix(".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_between(path: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks in a text file."""
    before, rest = path.read_text(encoding="utf-8").split(marks[0])
    write_text(path, before + marks[0] + text + marks[1] + rest.split(marks[1])[1])


def replace_folder(aside: Path, path: Path) -> None:
    """Move a finished folder into its place, where an older one may be."""
    old = Path(tempfile.mkdtemp(prefix=f"{path.name}.old-", dir=path.parent))
    if path.exists():
        path.rename(old / path.name)
    aside.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make the folder for the results, and see that it can be written to: before the work, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None


def fingerprint(*weights: Tensor) -> str:
    """Tells a network from another of the same name, such as itself before it was trained on."""
    return hashlib.sha256(b"".join(w.detach().float().cpu().numpy().tobytes() for w in weights)).hexdigest()[:12]
