"""Tar files of captioned images, as webdataset and img2dataset write them: where each sample lies."""

import glob
import re
import tarfile
from pathlib import Path

import numpy as np

from support.errors import InputError
from support.images import SUFFIXES


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
    """(samples, 6) int64: where image, text and facts of every sample begin and how long they are, 0 if there is no
    such; and what ended the reading too soon."""
    samples, error = {}, None
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition(".")
                column = 0 if f".{kind.lower()}" in SUFFIXES else {"txt": 2, "json": 4}.get(kind)
                if member.isreg() and column is not None:
                    row = samples.setdefault(key, [0] * 6)
                    row[column : column + 2] = member.offset_data, member.size
            if tar.offset + 512 > file.stat().st_size:  # tarfile takes a cut between two members for the end
                error = "it has no end"
    except (OSError, tarfile.TarError) as reason:
        error = reason
    rows = [row for row in samples.values() if row[0]]
    return np.array(rows, np.int64).reshape(-1, 6), error
