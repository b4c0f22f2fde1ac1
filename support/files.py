"""Reading and writing files: JSON, text, tensors, folders. What is written appears whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from support.errors import InputError


def decode(content: bytes) -> str:
    """UTF-8, with or without the byte order mark that some editors begin with. Raises ValueError."""
    text = content.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds zero bytes")
    return text


def read_text(path: Path) -> str:
    """The content of a text file. Raises InputError."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from None
    except ValueError as error:
        raise InputError(f"cannot read {path}: it is no UTF-8 text ({error}); save it as UTF-8") from None


def read_json(path: Path) -> dict:
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold names and values in braces; fetch the file again")
    return content


def listed(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Write a file or folder whole or not at all: yields where to write it, and moves it to `path` at the end.

    Raises InputError where it cannot be written, for example on a full disk.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        remove(aside)  # of a process that was killed
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        for part in [aside, *aside.rglob("*")]:
            sync(part)
        if path.is_dir() and aside.is_dir():  # a rename replaces a file, but not a folder that holds something
            old = Path(tempfile.mkdtemp(prefix=f"{path.name}.old-", dir=path.parent))
            path.rename(old / path.name)
            aside.rename(path)
            remove(old)
        else:
            aside.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}; make room, or choose another place") from None
    finally:
        remove(aside)


def sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replaced(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that other libraries read, too."""
    with replaced(path) as aside:
        aside.touch()
        mode = aside.stat().st_mode
        # transformers reads a weight file only if its metadata says which framework wrote it
        save_file({name: w.contiguous() for name, w in tensors.items()}, aside, {"format": "pt"} | (metadata or {}))
        aside.chmod(mode)  # the library makes files that only their owner can read


def write_between(path: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks in a text file."""
    before, rest = path.read_text(encoding="utf-8").split(marks[0])
    write_text(path, before + marks[0] + text + marks[1] + rest.split(marks[1])[1])


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
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def version_of(*paths: Path) -> str:
    """Changes whenever a file of the model does: hashes names, sizes and times, and the content of small files, since
    reading gigabytes of weights at every start would take longer than drawing."""
    digest = hashlib.sha256()
    for path in paths:
        for file in filter(Path.is_file, sorted(path.rglob("*")) if path.is_dir() else [path]):
            about = file.stat()
            content = file.read_bytes() if about.st_size < 2**20 else str(about.st_mtime_ns).encode()
            digest.update(f"{file.name} {about.st_size} ".encode() + content)
    return digest.hexdigest()[:12]
