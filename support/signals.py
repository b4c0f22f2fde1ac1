"""Signals that end a run without losing the update at hand, also while it waits for data."""

import multiprocessing
import signal
from collections.abc import Iterator


class Stop:
    """Ctrl-C, or a signal of a queueing system, ends the run after the update at hand; a second Ctrl-C at once."""

    def __init__(self):
        self.asked, self.waiting = False, False

    def __enter__(self) -> "Stop":
        which = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
        heard = [one for one in which if signal.getsignal(one) != signal.SIG_IGN]  # nohup ignores SIGHUP
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
