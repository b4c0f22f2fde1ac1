"""Batches of a data set, read by other processes."""

import signal
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


def load(source: Dataset, numbers: list[Iterable[int]], workers: int) -> Iterator[dict]:
    """Batches of the items of these numbers, read by `workers` processes.

    They send NumPy arrays, which go through pipes. Tensors would go through shared memory, and containers often have
    only 64 MB of that.
    """
    loader = DataLoader(
        source, batch_sampler=numbers, num_workers=workers, collate_fn=collate, worker_init_fn=leave_signals_alone
    )
    for batch in loader:
        arrays = {name: torch.from_numpy(x) for name, x in batch.items() if isinstance(x, np.ndarray)}
        if torch.cuda.is_available():  # a GPU fetches them from pinned memory beside its work
            arrays = {name: x.pin_memory() for name, x in arrays.items()}
        yield batch | arrays


def collate(items: list[dict]) -> dict:
    """-> arrays (B, ...), and lists of captions."""
    columns = {name: [item[name] for item in items] for name in items[0]}
    return {name: x if isinstance(x[0], str) else np.stack([*map(np.asarray, x)]) for name, x in columns.items()}


def leave_signals_alone(worker: int) -> None:
    for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # they are for the trainer
        signal.signal(which, signal.SIG_IGN)
