"""Tar files of captioned images, as webdataset and img2dataset write them: where each sample lies."""

import glob
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.devices import rank_and_world
from support.errors import InputError
from support.images import SUFFIXES, is_hidden

ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
COLUMNS = dict.fromkeys(SUFFIXES, 0) | {".txt": 2, ".json": 4}


def shards_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.lower().endswith(ENDINGS) and not is_hidden(file.name))


def shard_files(where: Path) -> list[Path]:
    """The tar files that a folder or a pattern means. Raises InputError where one does not exist."""
    files = shards_in(where) if where.is_dir() else []
    patterns = [] if where.is_dir() else expand(str(where))
    for name in patterns:
        found = sorted(map(Path, glob.glob(name.replace("[", "[[]"))))  # names may hold brackets
        if not found:
            raise InputError(f"{name} does not exist; check the path")
        files += found
    for file in files:
        if file.suffix.lower() != ".tar":
            raise InputError(f"{file} is no .tar file; unpack it to one, where samples can be read one by one")
    return files


def expand(pattern: str) -> list[str]:
    """A pattern with each {000..059} in it replaced by its numbers."""
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not span:
        return [pattern]
    first, last = span.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [name for n in numbers for name in expand(pattern.replace(span.group(), n, 1))]


def read_tables(files: list[Path]) -> list[np.ndarray]:
    """The table of each tar. One that was cut short is named on stderr, and used as far as it goes.

    Raises InputError where these are more than one, and more than 5%.
    """
    tables, damaged, quiet = [], [], rank_and_world()[0] > 0
    for file in tqdm(files, desc="reading the shards' tables", leave=False, disable=quiet):
        table, error = read_table(file)
        tables.append(table)
        if error:
            damaged.append(file)
            if not quiet:
                print(f"notice: {file} is damaged, its first {len(table)} samples are used: {error}", file=sys.stderr)
    if len(damaged) > max(1, 0.05 * len(files)):
        raise InputError(f"{len(damaged)} of {len(files)} shards are damaged, the last {damaged[-1]}; see above")
    return tables


def read_table(file: Path) -> tuple[np.ndarray, object]:
    """(N, 6) int64: where image, text and facts (JSON) of each sample begin, and their lengths, 0 if there are none.
    And what ended the reading too soon. Only the headers of what the tar holds are read."""
    samples, error = {}, None
    try:
        with open(file, "rb") as stream:
            while block := stream.read(512):
                if not block.strip(b"\0"):
                    continue  # the end of a tar, which another may follow: cat a.tar b.tar
                start = stream.seek(-len(block), 1)
                with tarfile.open(fileobj=stream, mode="r:") as tar:
                    for member in tar:
                        add(samples, start, member)
                if tar.offset == start:
                    raise tarfile.ReadError(f"no header at byte {start}")
                stream.seek(tar.offset)
    except (OSError, tarfile.TarError) as reason:
        error = reason
    rows = [row for row in samples.values() if row[0]]
    return np.array(rows, np.int64).reshape(-1, 6), error or (None if samples else "it is empty")


def add(samples: dict, tar: int, member: tarfile.TarInfo) -> None:
    """Note where a file of a tar lies. Joined tars may use the same names again."""
    name = Path(member.name)
    column = COLUMNS.get(name.suffix.lower())
    if member.isreg() and column is not None and not any(map(is_hidden, name.parts)):
        row = samples.setdefault((tar, name.with_suffix("")), [0] * 6)
        row[column : column + 2] = member.offset_data, member.size
