"""What scores need and a reader may skip: files of statistics, images read ahead, left out, and how they were made."""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from support.devices import rank_and_world
from support.errors import InputError
from support.files import listed, replaced
from support.images import settings_of_png


@dataclass
class Statistics:
    mu: np.ndarray  # (D,) mean of the features
    sigma: np.ndarray  # (D, D) their covariance, divided by count - 1
    count: int | None = None  # None and "" where another tool wrote the file
    name: str = ""

    @property
    def size(self) -> int:
        return len(self.mu)

    def save(self, file: Path) -> None:
        """In the common tools' format, which is `mu` and `sigma`; they leave our other two alone."""
        with replaced(file) as aside, open(aside, "wb") as stream:
            np.savez(stream, mu=self.mu, sigma=self.sigma, count=self.count or 0, name=self.name)

    @classmethod
    def load(cls, file: Path) -> "Statistics":
        try:
            with np.load(file, allow_pickle=False) as content:
                mu, sigma = (np.asarray(content[key], dtype=np.float64) for key in ("mu", "sigma"))
                count, name = (content[key].item() if key in content else None for key in ("count", "name"))
            finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
            if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not finite or not np.allclose(sigma, sigma.T):
                raise ValueError("they should be a mean (D,) and a covariance (D, D), finite and symmetric")
        except Exception as error:  # NumPy has many ways to say it
            raise InputError(f"{file} does not hold mu and sigma: {error}; check the path or make it again") from None
        return cls(mu, sigma, count or None, name or "")


def read_ahead(
    files: list[Path], read: Callable[[Path], object], size: int, workers: int, title: str | None
) -> Iterator[list[tuple[int, object]]]:
    """Batches of (i, read(files[i])). Threads read the next two while one is in use. Without a title, no progress bar.

    An image that cannot be read is left out and named on stderr. Threads, not processes: pillow runs in parallel in
    them, and processes would hand over images through shared memory, of which containers often have too little.
    """

    def attempt(i: int) -> tuple[int, object] | None:
        try:
            return i, read(files[i])
        except Exception as error:  # pillow has many ways to say that a file is damaged
            tqdm.write(f"notice: {files[i]} is left out: {error}", file=sys.stderr)

    bar = tqdm(total=len(files), desc=title, unit=" images", disable=title is None)
    with bar, ThreadPoolExecutor(max(workers, 1)) as threads:
        batches = [range(start, min(start + size, len(files))) for start in range(0, len(files), size)]
        waiting, reading = iter(batches), deque()
        for batch in batches:
            reading.extend(threads.map(attempt, more) for more in islice(waiting, 3 - len(reading)))
            if readable := [item for item in reading.popleft() if item]:
                yield readable
            bar.update(len(batch))


def add_up(table: Tensor) -> Tensor:
    """The sum of the tables of all processes that torchrun started."""
    if rank_and_world()[1] > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
        torch.distributed.all_reduce(table)
    return table


def check_left_out(left_out: int, total: int, where: Path, why: str = "cannot be used, see above") -> None:
    """One image in a hundred may be left out, with a notice, and always one. Raises InputError if there are more."""
    message = f"{where}: {left_out} of {total} images {why}"
    if left_out > max(1, total // 100) or left_out == total:
        raise InputError(message)
    if left_out and rank_and_world()[0] == 0:
        print(f"notice: {message}", file=sys.stderr)


def settings_of_run(folder: Path, files: list[Path]) -> dict[str, str]:
    """How sample.py made the images of a folder; {} for other images. Raises InputError if not all are of one run."""
    made = [settings_of_png(file) for file in files]
    others = [str(file) for file, settings in zip(files, made) if not settings]
    made = [settings for settings in made if settings]
    names = dict.fromkeys(name for settings in made for name in settings if name not in ("prompt", "index"))
    values = {name: dict.fromkeys(settings.get(name, "unknown") for settings in made) for name in names}
    if mixed := [f"{name} {' and '.join(several)}" for name, several in values.items() if len(several) > 1]:
        raise InputError(f"{folder} holds images of several runs ({listed(mixed)}); move those of other runs away")
    if made:
        check_left_out(len(others), len(files), folder, f"are not of sample.py like the others ({listed(others)})")
    return made[0] if made else {}
