"""How a training run starts, stops and goes on, and what it leaves on disk: checkpoints, its log, the result.

Nothing of the method is here; it is in `train.py`. A run may be killed at any moment, and may use several machines.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch.utils.data import Dataset
from tqdm import tqdm

from support.devices import Process
from support.errors import InputError
from support.files import fingerprint, make_folder, remove, replaced, write_text

INPUTS = "base", "teacher", "student", "data"
# What a resumed run must have in common with the interrupted one, besides the content of the inputs.
KEPT = """windows alpha solver_steps lr warmup starts gap cooldown ema seed augment lora teacher_guidance
    epsilon_loss reuse""".split()
locks = []  # of this process, until it ends


def together(process: Process, work: Callable[[], object]) -> object:
    """What work() returns in this process. If it fails in any process, all of them end."""
    try:
        result, error = work(), None
    except (InputError, OSError) as failure:
        result, error = None, str(failure)
    errors = process.gather(error)
    if ranks := [rank for rank, error in enumerate(errors) if error]:
        where = f"rank {', '.join(map(str, ranks))}: " if process.world > 1 else ""
        raise InputError(where + errors[ranks[0]])
    return result


def same_as_first(process: Process, facts: dict, args: argparse.Namespace) -> None:
    """Machines that do not share a folder may have loaded different things."""
    for name, value in process.gather(facts)[0].items():
        if facts[name] != value:
            folder = getattr(args, name) if name in INPUTS else args.run
            raise InputError(f"{name} is {facts[name]}, but {value} in rank 0; all machines must share {folder}")


def check_models(args: argparse.Namespace, before: Path | None) -> None:
    """Raise InputError unless the models that training needs are folders. before: that of the stage before."""
    for path in args.base, args.teacher, args.student:
        if not path.exists():
            hint = f"train stage {args.stage - 1} first, or name a --teacher" if path == before else "check the path"
            raise InputError(f"the model {path} does not exist; {hint}")
        if path.is_file():
            raise InputError(f"{path} is a single file; make a folder of it: python -m tools.convert {path} FOLDER")
    if args.lora and args.student != args.teacher:
        raise InputError("--lora trains an update of the teacher; leave --student out")


def claim(args: argparse.Namespace) -> None:
    """See that nothing of others will be replaced, and lock the run's folder for as long as this process lives."""
    if Path(args.name).name != args.name or args.name == "..":
        raise InputError(f"--name {args.name} is not the name of a folder")
    for used in filter(None, [getattr(args, name) for name in INPUTS]):
        for made in args.result.resolve(), args.run.resolve():
            if made.is_relative_to(used.resolve()) or used.resolve().is_relative_to(made):
                raise InputError(f"{made} is, holds or lies in {used}, which is needed; choose another --out")
    make_folder(args.run)
    lock = (args.run / "lock").open("a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # readers of data do not inherit it
    except (BlockingIOError, PermissionError):
        raise InputError(f"another process trains in {args.run}; wait for it, or choose another --out") from None
    except OSError:
        pass  # a network disk without locks
    locks.append(lock)
    if checkpoints(args.run) and not args.resume:
        raise InputError(f"{newest(args.run)} is there already; go on with --resume, or choose another --out")
    record = args.run / "result"
    if args.result.exists() and not (record.exists() and record.read_text() in ("", weights_in(args.result))):
        raise InputError(f"{args.result} is there already, but not from {args.run}; choose another --out")
    for left in args.run.glob("*.partial"):  # by a process that was killed
        remove(left)


@contextlib.contextmanager
def recorded(args: argparse.Namespace) -> Iterator[None]:
    """While the result is written: note that it is this run's, which alone may replace it."""
    write_text(args.run / "result", "")
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; then --resume finishes it from {newest(args.run)}") from None
    write_text(args.run / "result", weights_in(args.result))
    print(f"{args.result} is ready: python sample.py --model {args.result} --steps {max(args.windows, 4)} --prompt ...")


def settings_of(args: argparse.Namespace, source: Dataset, batch: int) -> dict:
    """What a resumed run must have in common with the interrupted one. batch: samples of an update."""
    settings = {name: getattr(args, name) for name in KEPT} | {"iters": args.iters if args.cooldown else "any"}
    models = {folder: weights_in(folder) for folder in {args.base, args.teacher, args.student}}
    settings |= {name: models[getattr(args, name)] for name in ("teacher", "student", "base")}
    return settings | {"data": samples_in(source), "batch": batch}


def weights_in(model: Path) -> str:
    """Tells the model in a folder from another one there: the fingerprint of a thousand numbers of each tensor."""
    few = []
    for file in sorted(model.glob("*/*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for weight in map(tensors.get_tensor, sorted(tensors.keys())):
                few.append(weight.flatten()[:: weight.numel() // 1000 + 1].clone())
    return fingerprint(*few)


def samples_in(source: Dataset) -> str:
    """Tells data from other data in the same place: the number of samples and the names of their files."""
    if source.endless:
        return source.name
    files = getattr(source, "files", [])  # of latents, the number alone is compared
    root = os.path.commonpath([file.parent for file in files] or [""])
    names = "\n".join(str(file)[len(root) :] for file in files)
    return f"{len(source)} samples, {hashlib.sha256(os.fsencode(names)).hexdigest()[:12]}"


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("step-*.pt"))


def save_checkpoint(process: Process, run: Path, parts: dict[str, object], settings: dict, step: int) -> None:
    """All that going on needs, in one file run/step-N.pt. The one before it is kept, too, where there is room."""
    file, older = run / f"step-{step:07d}.pt", checkpoints(run)
    if step > 0 and hasattr(parts["optimizer"], "consolidate_state_dict"):  # each process holds a share of the state
        parts["optimizer"].consolidate_state_dict()
    if process.rank > 0 or step == 0 or file in older:
        return
    state = {name: part.state_dict() for name, part in parts.items()} | {"step": step, "settings": settings}
    try:
        with replaced(file) as aside:
            torch.save(state, aside)
    except (InputError, RuntimeError) as error:  # the latter is what torch says of a full disk
        if len(older) < 2:
            reason = str(error).partition("\n")[0]
            raise InputError(f"cannot write {file}, is there room? {reason}. Last good: {newest(run)}") from None
        older[0].unlink()
        return save_checkpoint(process, run, parts, settings, step)
    for old in older[:-1]:
        old.unlink()


def newest(run: Path) -> Path | str:
    return checkpoints(run)[-1] if checkpoints(run) else "none was written yet"


def load_checkpoint(run: Path, parts: dict[str, object], settings: dict, iters: int) -> int:
    """Take up the newest checkpoint; returns its step, 0 where there is none."""
    *older, file = [None, *checkpoints(run)]
    if file is None:
        return 0
    try:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        # On the CPU first: on a GPU, Adam's counters would make it wait in each update.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # both have many ways to say it
        reason = str(error).partition("\n")[0]
        then = f"go on from {older[-1].name}" if older[-1] else "start anew"
        raise InputError(f"{file} is damaged ({reason}); remove it to {then}") from None
    for name, value in settings.items():
        if (before := state["settings"].get(name)) != value:
            raise InputError(f"{file} was made with {name} {before}, not {value}; --resume keeps settings")
    if state["step"] > iters:
        raise InputError(f"{file} is already past --iters {iters}; give at least {state['step']}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


class Log:
    """run/log.jsonl, one line per update; and a running mean on the progress bar."""

    def __init__(self, args: argparse.Namespace, step: int, quiet: bool):
        self.file, self.quiet, self.mean, self.since = args.run / "log.jsonl", quiet, None, time.monotonic()
        if not quiet:
            print(f"resumed at update {step}" if step else f"no checkpoint in {args.run}: from 0", flush=True)
            lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
            whole = [line for line in lines if line.endswith("}\n")]  # the last one may have been cut off
            # What a resumed run does again is not to be in the log twice.
            write_text(self.file, "".join(line for line in whole if json.loads(line)["step"] <= step))
        self.bar = tqdm(total=args.iters, initial=step, disable=quiet, desc=args.name)

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers of update `step`, counted from 1."""
        self.bar.update()
        if self.quiet:
            return
        line = {"step": step} | {name: float(f"{number:.6g}") for name, number in numbers.items()}
        line["seconds"], self.since = round(time.monotonic() - self.since, 3), time.monotonic()
        if torch.cuda.is_initialized():
            line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.mean = numbers["loss"] if self.mean is None else 0.98 * self.mean + 0.02 * numbers["loss"]
        self.bar.set_postfix(loss=f"{self.mean:.4f}")


def report_divergence(step: int, losses: list[float], run: Path) -> None:
    """Stop, in all processes, before the weights are touched."""
    ranks = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    where = f"the loss of rank {', '.join(ranks)}" if ranks else "the gradient"
    raise InputError(f"{where} is not finite in update {step}; last good checkpoint: {newest(run)}. Try a lower --lr")
