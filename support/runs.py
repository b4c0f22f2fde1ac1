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

import checkpoint
from model import NETWORKS, InputError, StableDiffusion
from unet import UNet


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("step-???????"))


def save_checkpoint(run: Path, step: int, parts: dict[str, object], settings: dict) -> Path:
    """A folder run/step-N with all that going on needs. It appears whole or not at all; then older ones are removed."""
    folder = run / f"step-{step:07d}"
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, aside / "state.pt")
    checkpoint.write_json(aside / "settings.json", settings)
    checkpoint.replace_folder(aside, folder)
    for older in checkpoints(run):
        if older != folder:
            shutil.rmtree(older, ignore_errors=True)
    return folder


def load_checkpoint(run: Path, parts: dict[str, object], settings: dict, device: torch.device) -> int:
    """Take up the newest checkpoint; returns its step, 0 where there is none."""
    if not checkpoints(run):
        return 0
    folder = checkpoints(run)[-1]
    before = checkpoint.read_json(folder / "settings.json")
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


def flow_scheduler(teacher: StableDiffusion, windows: int, guidance: float = 1.0) -> dict:
    """The scheduler settings that make a flow of a model, as PeRFlow's tools read them; and the guidance that its paths
    hold, which `sample.py` looks at."""
    form = teacher.prediction_type if teacher.windows else "ddim_eps"
    flow = {"_class_name": "PeRFlowScheduler", "num_time_windows": windows, "prediction_type": form}
    return teacher.configs["scheduler"] | flow | ({} if guidance == 1 else {"trained_guidance": guidance})


def save_flow(unet: UNet, scheduler: dict, base: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the flow as a complete model folder: a new UNet and scheduler, and all other parts of `base`, hard-linked
    where the file system can. It appears whole or not at all."""
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    parts = [name for name in checkpoint.read_json(base / "model_index.json") if (base / name).is_dir()]
    files = [file for part in parts for file in sorted((base / part).rglob("*")) if file.is_file()]
    for file in [base / "model_index.json", *files]:
        new = aside / file.relative_to(base)
        weights_of_unet = file.parent == base / "unet" and file.name != "config.json"
        if file.suffix in checkpoint.PICKLES or weights_of_unet:
            continue
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), new)
        except OSError:
            shutil.copyfile(file, new)
    (aside / "scheduler/scheduler_config.json").unlink()  # else the link's other end would change, too
    checkpoint.write_json(aside / "scheduler/scheduler_config.json", scheduler)
    weights = {name: weight.to(dtype) for name, weight in unet.state_dict().items()}
    checkpoint.write_tensors(aside / f"unet/{NETWORKS['unet'][2]}.safetensors", weights)
    checkpoint.replace_folder(aside, out)


def start_training(arguments: list, processes: int, threads: int, **how) -> subprocess.CompletedProcess:
    """Run train.py under torchrun, in so many processes of so many threads; `how` is for `subprocess.run`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += [Path(__file__).parent / "train.py", *arguments]
    return subprocess.run([str(part) for part in command], env=os.environ | {"OMP_NUM_THREADS": str(threads)}, **how)


class Log:
    """run/log.jsonl, one line per `every` steps with their means; and the same on the progress bar."""

    def __init__(self, run: Path, step: int, args: argparse.Namespace, quiet: bool):
        self.file, self.every, self.quiet = run / "log.jsonl", args.log_every, quiet
        self.sums, self.count, self.since = None, 0, time.time()
        self.bar = tqdm(total=args.iters, initial=step, disable=quiet, desc=args.name)
        if not quiet:  # what a resumed run does again is not to be in the log twice
            kept = [line for line in self.lines() if json.loads(line)["step"] <= step]
            checkpoint.write_text(self.file, "".join(kept))

    def lines(self) -> list[str]:
        whole = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        return [line for line in whole if line.endswith("}\n")]  # the last one may have been cut off

    def add(self, step: int, numbers: dict[str, float], evaluations: int) -> None:
        self.bar.update()
        self.sums = {name: number + (self.sums or {}).get(name, 0) for name, number in numbers.items()}
        self.count += 1
        if self.quiet or step % self.every:
            return
        seconds = time.time() - self.since
        line = {name: total / self.count for name, total in self.sums.items()}
        line["left_out"] = self.sums["left_out"]  # pictures that could not be read: how many, not how many per step
        line |= {"step": step, "evaluations_per_second": evaluations * self.count / seconds}
        if torch.cuda.is_initialized():
            line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        with self.file.open("a") as file:
            file.write(
                json.dumps({name: float(f"{number:.6g}") for name, number in line.items()} | {"step": step}) + "\n"
            )
        shown = {"loss": line["loss"], "mse": line["mse"], "cos": line["cos"]}
        self.bar.set_postfix(
            {k: f"{v:.4f}" for k, v in shown.items()} | {"NFE/s": f"{line['evaluations_per_second']:.0f}"}
        )
        self.sums, self.count, self.since = None, 0, time.time()


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
