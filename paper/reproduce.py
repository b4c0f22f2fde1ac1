"""From a diffusion model and a data set to the paper's tables: 1 and 2 of SD1.5, or 3 of SDXL.

    python -m paper.reproduce --model sd15 --data 'laion/*.tar' --coco coco --inception FILE --clip DIR --out runs/sd15

It runs the seven commands below, one after the other, on all GPUs of this machine. `--list` prints them instead.
OUT/table.md grows with every score; OUT/results.json notes what is finished. The same command again goes on where it
was. After a change of options or files, what depends on them is made again. The diffusion model is scored before any
training, so that you see early whether scores are right. Read `train.py`, `sample.py` and `evaluation/coco.py` first.
"""

import argparse
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from paper.figures import markdown
from sample import SAMPLERS
from support.errors import InputError, Parser, at_least_0, one_line_errors, positive_int
from support.files import make_folder, read_json, version_of, write_json, write_text
from support.latents import latents_in

PROMPTS = """python -m evaluation.coco {protocol} {coco}/annotations/captions_{photos}.json {coco}/{photos}
             --out {out}/{folder}"""
REFERENCE = """torchrun fid.py {out}/{folder}/reference --protocol {protocol} --weights {inception}
               --save-stats {out}/{folder}/reference.npz"""
CACHE = "torchrun -m tools.cache --model {model} --data {data} --out {latents}"
TRAIN = "torchrun train.py --stage {stage} --model {model} --data {latents} --out {out} --resume"
DRAW = """torchrun sample.py --model {flow} --prompts {out}/{folder}/prompts.txt --out {out}/{name}
          --steps {steps} --sampler {sampler} --guidance {guidance}"""
FID = "torchrun fid.py {out}/{folder}/reference.npz {out}/{name} --protocol {protocol} --weights {inception}"
CLIP = "torchrun -m evaluation.clip_score {out}/{name} --clip {clip}"

MODELS = "diffusion model", "8 windows", "ProReflow-I", "ProReflow-II"  # of stage 0, 1, ...
# The rows of every table: stage of the model, steps, sampler. Then the paper's FID / CLIP score in these rows.
ROWS = (0, 32, "ddim"), (0, 4, "dpm++"), (2, 4, "flow"), (3, 4, "flow"), (3, 2, "flow")
SD15 = {
    "coco2017-5k": ["", "", "22.97 / 30.29", "22.03 / 29.95", "27.59 / 27.79"],
    "coco2014-30k": ["10.05", "22.36", "11.16", "10.70", "15.44"],
}
SDXL = {"coco2017-5k": ["", "", "25.36", "25.36", ""], "coco2014-10k": ["", "", "19.10", "19.10", ""]}
HEAD = ["data", "model", "steps", "guidance", "images", "FID", "CLIP score", "the paper's"]
REMARKS = """
The paper's guidance is 4 in table 4, so probably in table 1 (SD1.5, coco2017-5k). For tables 2 (coco2014-30k) and 3
(SDXL) it is not known, nor which stage made the SDXL of table 3: both rows show its FID. Each score's line in
results.json names mode, network and counts. Compare only lines that name the same.
"""


# ---- The recipe -----------------------------------------------------------------------------------------------------


@dataclass
class Step:
    name: str  # in results.json: the path in OUT of what it makes, or what it is a score of
    command: list[str]
    inputs: tuple[Path, ...] = ()  # when one of these or the command has changed, it is no longer finished
    only_for: tuple["Step", ...] = ()  # when these are finished, it is not needed


def recipe(args: argparse.Namespace, rows: list[dict]) -> Iterator[Step]:
    """All steps, in order."""
    for row in {row["protocol"]: row for row in rows}.values():
        folder, count = args.out / row["folder"], ["--count", str(args.images)] if args.images else []
        captions = args.coco / f"annotations/captions_{row['photos']}.json"
        yield Step(f"{folder.name}/prompts.txt", fill(PROMPTS, row) + count, (captions,))
        if args.inception:
            yield Step(f"{folder.name}/reference.npz", fill(REFERENCE, row), (folder / "prompts.txt", args.inception))
    cached = args.data.is_dir() and latents_in(args.data)
    latents = args.data if cached else args.out / "latents"
    _, others = train.arguments().parse_known_args(args.training)  # ends here where a number is wrong
    train_stage = TRAIN.replace("train.py", "-m paper.variants") if others else TRAIN  # it has more options
    for stage in range(len(MODELS)):
        known = vars(args) | {"stage": stage, "latents": latents}
        if stage == 1 and not cached:
            yield Step("latents/made_of.json", fill(CACHE, known))
        if stage > 0:
            inputs = weights_of(stage - 1, args), latents / "made_of.json"
            yield Step(f"stage-{stage}", fill(train_stage, known) + args.training, inputs)
        for row in rows:
            if row["stage"] == stage:
                yield from draw_and_score(row, args)


def draw_and_score(row: dict, args: argparse.Namespace) -> list[Step]:
    name, inputs, scores = row["name"], (weights_of(row["stage"], args), args.out / row["folder"] / "prompts.txt"), []
    if args.inception:
        scores.append(Step(f"{name} FID", fill(FID, row), (*inputs, args.inception)))
    if args.clip:
        scores.append(Step(f"{name} CLIP score", fill(CLIP, row), (*inputs, args.clip)))
    return [Step(f"{name}/sheet.png", fill(DRAW, row), inputs, tuple(scores)), *scores]


def weights_of(stage: int, args: argparse.Namespace) -> Path:
    """What changes when a model's weights do: of a flow, the trainer's note of them."""
    return args.out / f"stage-{stage}-run/result" if stage else args.model


def fill(command: str, values: dict) -> list[str]:
    """The words of a command. It is split first: paths may hold spaces."""
    return [word.format_map(values) for word in command.split()]


def rows_of(args: argparse.Namespace) -> list[dict]:
    """The rows of the table, each with all that its commands name. A protocol without its files in COCO is left out."""
    is_sdxl = read_json(args.model / "unet/config.json").get("cross_attention_dim") == 2048
    rows = []
    for protocol, paper in (SDXL if is_sdxl else SD15).items() if args.coco else ():
        photos = "val2017" if protocol == "coco2017-5k" else "val2014"
        if not all((args.coco / name).exists() for name in (photos, f"annotations/captions_{photos}.json")):
            print(f"notice: no {photos} or its captions in {args.coco}, so no {protocol}", file=sys.stderr)
            continue
        folder = f"{protocol}-{args.images}" if args.images else protocol
        for ((stage, steps, sampler), scores), guidance in itertools.product(zip(ROWS, paper), args.guidance):
            row = {"protocol": protocol, "photos": photos, "folder": folder, "paper": scores}
            row |= {"stage": stage, "steps": steps, "sampler": sampler, "guidance": f"{guidance:g}"}
            row["flow"] = args.out / f"stage-{stage}" if stage else args.model
            row["name"] = f"{folder}/stage-{stage}-{sampler}-{steps}-steps-guidance-{guidance:g}"
            rows.append(vars(args) | row)
    return rows


# ---- Running it -----------------------------------------------------------------------------------------------------


def reproduce(args: argparse.Namespace) -> None:
    if "RANK" in os.environ:
        raise InputError("start this without torchrun; it starts its processes itself, by --launcher")
    for name, scores in {"model": "", "coco": "images", "inception": "FID", "clip": "CLIP score"}.items():
        path = getattr(args, name)
        if path is None:
            print(f"notice: no --{name}, so no {scores}", file=sys.stderr)
        elif not path.exists():
            raise InputError(f"--{name} {path} does not exist; check the path")
    for name in "model", "data", "coco", "inception", "clip", "out":  # a command is then the same from every folder
        setattr(args, name, getattr(args, name) and getattr(args, name).absolute())
    rows = rows_of(args)
    steps = list(recipe(args, rows))
    if not args.list:
        make_folder(args.out)
    for step in steps:
        program, *rest = step.command
        line = (shlex.split(args.launcher) if program == "torchrun" else [program]) + rest
        if args.list:
            print(shlex.join(line))
        elif not finished(step, args.out):
            print(f"\n$ {shlex.join(line)}", flush=True)
            note = {"printed": run(line).strip().rpartition("\n")[2]} | state_of(step)
            write_json(args.out / "results.json", notes_in(args.out) | {step.name: note})
            write_text(args.out / "table.md", table(args, rows, steps))
    if not args.list:
        print(f"\n{table(args, rows, steps)}\n{args.out / 'table.md'}: all {len(steps)} steps are finished")


def finished(step: Step, out: Path) -> bool:
    if step.only_for:
        return all(finished(other, out) for other in step.only_for)
    there = step.name.endswith((" FID", " CLIP score")) or (out / step.name).exists()
    return there and state_of(step).items() <= notes_in(out).get(step.name, {}).items()


def state_of(step: Step) -> dict:
    return {"command": shlex.join(step.command), "inputs": version_of(*step.inputs)}


def notes_in(out: Path) -> dict:
    file = out / "results.json"
    return read_json(file) if file.exists() else {}


def run(line: list[str]) -> str:
    """What a command prints. A signal to this process ends the command first, in the command's own way.

    Raises InputError where it fails.
    """
    # Else torchrun kills its processes 30 seconds after a signal. A large checkpoint takes longer.
    env = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    root = Path(__file__).parent.parent
    process = subprocess.Popen(line, cwd=root, env=env, stdout=subprocess.PIPE, text=True, errors="replace")
    signals, printed = [], ""

    def stop(which: int, frame: object) -> None:
        signals.append(which)
        if which == signal.SIGTERM:  # Ctrl-C reaches the command by itself
            process.terminate()

    before = {which: signal.signal(which, stop) for which in (signal.SIGINT, signal.SIGTERM)}
    with process:
        for text in process.stdout:
            print(text, end="", flush=True)
            printed += text
    for which, handler in before.items():
        signal.signal(which, handler)
    if signals:
        raise KeyboardInterrupt
    if process.returncode:
        raise InputError(f"exit code {process.returncode}, see above; what is finished is kept: {shlex.join(line)}")
    return printed


def table(args: argparse.Namespace, rows: list[dict], steps: list[Step]) -> str:
    """The scores so far, beside the paper's."""
    notes, lines = notes_in(args.out), [HEAD, ["---"] * len(HEAD)]
    known = [step.name for step in steps if step.name in notes and finished(step, args.out)]
    printed = {name: notes[name]["printed"] for name in known}
    for row in rows:
        fid, clip = (printed.get(f"{row['name']} {score}", "") for score in ("FID", "CLIP score"))
        images = re.search(r"(?:generated|over) (\d+)", fid or clip)
        model = MODELS[row["stage"]] + ("" if row["stage"] else f", {SAMPLERS[row['sampler']]}")
        cells = [row["folder"], model, row["steps"], row["guidance"], images[1] if images else ""]
        lines.append([*cells, number_in(fid), number_in(clip), row["paper"]])
    options = f"\nOptions of training: `{shlex.join(args.training)}`\n" if args.training else ""
    return f"# The paper's tables, reproduced\n\n{markdown(lines)}{REMARKS}{options}"


def number_in(printed: str) -> str:
    number = re.search(r"(?:FID|CLIP score) (-?[\d.]+): ", printed)
    return f"{float(number[1]):.2f}" if number else ""


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the diffusion model")
    parser.add_argument("--data", type=Path, required=True, help="captioned images, tar shards, or latents of them")
    parser.add_argument("--coco", type=Path, help="folder with annotations, val2014 and val2017; else no images")
    parser.add_argument("--inception", type=Path, help="the FID network; else no FID")
    parser.add_argument("--clip", type=Path, help="CLIP folder; else no CLIP score")
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    parser.add_argument("--guidance", type=at_least_0, nargs="+", default=[4.0], help="scales to draw with; default: 4")
    parser.add_argument("--images", type=positive_int, help="so many of each protocol; default: as many as the paper")
    gpus = torch.cuda.device_count() or 1
    parser.add_argument(
        "--launcher", default=f"torchrun --standalone --nproc-per-node {gpus}", help="what stands for torchrun"
    )
    parser.add_argument("--list", action="store_true", help="print the commands, and start nothing")
    parser.add_argument("training", nargs="*", metavar="-- OPTIONS", help="of train.py or paper.variants: -- --lora 64")
    with one_line_errors(parser, "stopped; the same command goes on where it was"):
        reproduce(parser.parse_args())


if __name__ == "__main__":
    main()
