"""What a training run leaves on disk, and how it is stopped: checkpoints, its log, and the finished flow.

Nothing of the method is here; it is in `train.py`, which uses this file. Folders appear whole or not at all: they are
written aside, then renamed, so that a run may be killed at any moment.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support.errors import InputError
from support.files import read_json, replace_folder, write_json, write_text


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("step-???????"))


def save_checkpoint(run: Path, step: int, parts: dict[str, object], settings: dict) -> Path:
    """A folder run/step-N with all that going on needs. It appears whole or not at all; then older ones are removed."""
    folder = run / f"step-{step:07d}"
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, aside / "state.pt")
    write_json(aside / "settings.json", settings)
    replace_folder(aside, folder)
    for older in checkpoints(run):
        if older != folder:
            shutil.rmtree(older, ignore_errors=True)
    return folder


def load_checkpoint(run: Path, parts: dict[str, object], settings: dict, device: torch.device) -> int:
    """Take up the newest checkpoint; returns its step, 0 where there is none."""
    if not checkpoints(run):
        return 0
    folder = checkpoints(run)[-1]
    before = read_json(folder / "settings.json")
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(f"{folder} was made with {name} {before.get(name)}, not {value}; --resume keeps settings")
    try:
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except Exception as error:  # torch.load and load_state_dict have many ways to say it
        reason = str(error).partition("\n")[0]
        raise InputError(f"{folder} is damaged ({reason}); remove it to go on from an older one, or anew") from None
    return state["step"]


def start_training(arguments: list, processes: int, threads: int, **how) -> subprocess.CompletedProcess:
    """Run train.py under torchrun, in so many processes of so many threads; `how` is for `subprocess.run`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += [Path(__file__).parent.parent / "train.py", *arguments]
    return subprocess.run([str(part) for part in command], env=os.environ | {"OMP_NUM_THREADS": str(threads)}, **how)


class Log:
    """run/log.jsonl, one line per update; and a running mean on the progress bar."""

    def __init__(self, run: Path, step: int, args: argparse.Namespace, quiet: bool):
        self.file, self.quiet, self.mean, self.since = run / "log.jsonl", quiet, None, time.time()
        self.bar = tqdm(total=args.iters, initial=step, disable=quiet, desc=args.name)
        if not quiet:  # what a resumed run does again is not to be in the log twice
            kept = [line for line in self.lines() if json.loads(line)["step"] <= step]
            write_text(self.file, "".join(kept))

    def lines(self) -> list[str]:
        whole = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        return [line for line in whole if line.endswith("}\n")]  # the last one may have been cut off

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers of update `step`, counted from 1."""
        self.bar.update()
        if self.quiet:
            return
        line = {"step": step} | {name: float(f"{number:.6g}") for name, number in numbers.items()}
        line["seconds"], self.since = round(time.time() - self.since, 3), time.time()
        if torch.cuda.is_initialized():
            line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.mean = numbers["loss"] if self.mean is None else 0.98 * self.mean + 0.02 * numbers["loss"]
        self.bar.set_postfix(loss=f"{self.mean:.4f}")


class Stop:
    """Ctrl-C, or SIGTERM of a queueing system, ends the run after the step at hand; a second Ctrl-C at once."""

    def __init__(self):
        self.asked = False
        self.before = {which: signal.signal(which, self.ask) for which in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, which: int, frame: object) -> None:
        self.asked = True
        self.restore()

    def restore(self) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)
