"""Batches of a data set, read by other processes; and signals that end a run, also while it waits for a batch."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


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
    for which in SIGNALS:  # they are for the trainer
        signal.signal(which, signal.SIG_IGN)


class Stop:
    """Ctrl-C, or a signal of a queueing system, ends the run after the update at hand; a second Ctrl-C at once."""

    def __init__(self):
        self.asked, self.waiting = False, False

    def __enter__(self) -> "Stop":
        heard = [one for one in SIGNALS if signal.getsignal(one) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.before = {one: signal.signal(one, self.ask) for one in heard}
        return self

    def ask(self, which: int, frame: object) -> None:
        at_once = which == signal.SIGINT if self.asked else self.waiting
        self.asked = True
        if at_once:
            raise KeyboardInterrupt

    def next(self, batches: Iterator[dict]) -> dict | None:
        """The next batch; None once the run was asked to stop, even while it waits for data."""
        try:
            self.waiting = True
            items = None if self.asked else next(batches)
            self.waiting = False
            return items
        except KeyboardInterrupt:
            return None

    def __exit__(self, *_: object) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader would take the end of its readers for a failure
        for reader in multiprocessing.active_children():  # they take no notice of gentler signals
            reader.kill()
