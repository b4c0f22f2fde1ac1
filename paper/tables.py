"""The paper's tables in miniature: every method trained at equal cost, with several seeds, scored on the test split.

    python -m tools.cache --out out/latents                      first, once: what is trained on
    python -m paper.tables                                       all methods, two seeds: two hours on two cores
    python -m paper.tables --methods perflow i --seeds 0         some of it; or eight-1 four-1: figure 4
    python -m paper.tables --table                               what was measured, into paper/README.md and figures/

Cost is counted in network evaluations (`variants.nfe_of_sample`), earlier stages included. A run may be interrupted and
repeated. Read `train.py` and `paper/figures.py` first.
"""

import argparse
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from miniature.judge import prompt_accuracy
from model import MINIATURE, StableDiffusion
from paper import figures, reproduce
from paper.variants import nfe_of_sample
from support.devices import choose_device
from support.errors import InputError, Parser, one_line_errors
from support.files import write_between
from support.scenes import TEST

BATCH = 64  # samples of an update
CLEAR = 4.0  # a second guidance scale for prompt accuracy, where it is highest: the default of sample.py
RESULTS = figures.HERE / "results/experiments.json"
COST = 40_000  # NFE of one stage of ProReflow: on the miniature, 89 updates of the first, 125 of the others


@dataclass(frozen=True)
class Stage:
    """One run of train.py; `share` is its part of the cost, in that of one stage of ProReflow."""

    windows: int
    share: float = 1
    alpha: float = 0.1
    epsilon_loss: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the table: its stages, one after the other; the steps it is sampled in, and for each the paper's FID of
    table 2 (COCO-2014) and of tables 1 and 4 (COCO-2017), where there is one."""

    name: str
    stages: tuple[Stage, ...]
    steps: dict[int, str]


EIGHT, FOUR, TWO, ONE = Stage(8), Stage(4), Stage(2), Stage(1)
SOLVERS = {  # the teacher itself
    "ddim": Method("the teacher, DDIM", (), {32: "10.05", 8: "", 4: "", 2: "", 1: ""}),
    "dpm++": Method("the teacher, DPM-Solver++", (), {8: "", 4: "22.36"}),
}
METHODS = SOLVERS | {
    "published": Method("PeRFlow, with its published loss of epsilon", (Stage(4, 2, 0, True),), {4: "12.01 / 23.81"}),
    "perflow": Method("PeRFlow, with squared error of the velocity", (Stage(4, 2, 0),), {4: "23.81"}),
    # As many updates as ProReflow-I, each with 8 + 3 NFE a sample: 11 (1 / 7 + 1 / 5) of its stages' cost.
    "updates": Method("the same, with ProReflow-I's number of updates", (Stage(4, 3.77, 0),), {4: "23.81"}),
    "i": Method("**ProReflow-I**: 8, then 4 windows", (EIGHT, FOUR), {4: "11.16 / 22.97"}),
    "at-once": Method("without progressive reflow", (Stage(4, 2),), {4: "23.46"}),
    "plain": Method("without the direction term", (Stage(8, alpha=0), Stage(4, alpha=0)), {4: "23.09"}),
    "ii": Method("**ProReflow-II**: 8, 4, 2 windows", (EIGHT, FOUR, TWO), {4: "10.70 / 22.03", 2: "15.44 / 27.59"}),
    "two": Method("2 windows at once, plain loss", (Stage(2, 3, 0),), {2: ""}),
    "one": Method("one step: 8, 4, 2, 1 windows", (EIGHT, FOUR, TWO, ONE), {1: ""}),
    "reflow": Method("reflow: 1 window at once, plain loss", (Stage(1, 4, 0),), {1: ""}),
}
ALPHAS = (0.0, 0.1, 1.0, 10.0)  # figure 4: its methods by windows and alpha; two are in the table
FIGURE_4 = {8: {a: f"eight-{a:g}" for a in ALPHAS}, 4: {a: f"four-{a:g}" for a in ALPHAS} | {0: "plain", 0.1: "i"}}
RUNS = dict(METHODS)
for a in ALPHAS:
    RUNS.setdefault(FIGURE_4[8][a], Method(f"8 windows, alpha {a:g}", (Stage(8, alpha=a),), {8: ""}))
    stages = Stage(8, alpha=a), Stage(4, alpha=a)
    RUNS.setdefault(FIGURE_4[4][a], Method(f"8, then 4 windows, alpha {a:g}", stages, {4: ""}))


# ---- Training and scoring -------------------------------------------------------------------------------------------


def trained(method: Method, seed: int, cost: int, args: argparse.Namespace) -> tuple[Path, int]:
    """The folder of a method's flow, and its cost in NFE. Trains the stages that are not there yet."""
    folder, total, windows = MINIATURE, 0, train.TEACHER_STEPS
    out, names = args.out / f"cost-{cost}" / f"seed-{seed}", []
    for stage in method.stages:
        names.append(f"w{stage.windows}-share{stage.share:g}-alpha{stage.alpha:g}" + stage.epsilon_loss * "-epsilon")
        nfe = BATCH * nfe_of_sample(windows // stage.windows)
        iters = max(round(stage.share * cost / nfe), 1)
        total, teacher, folder, windows = total + iters * nfe, folder, out / "_".join(names), stage.windows
        if folder.exists():
            continue
        cores = torch.get_num_threads()  # OMP_NUM_THREADS, else what the machine has
        processes = 1 if torch.cuda.is_available() or cores < 2 else 2
        command = ["env", f"OMP_NUM_THREADS={max(cores // processes, 1)}", "torchrun", "--standalone"]
        command += ["--nproc-per-node", processes, "-m", "paper.variants", "--windows", stage.windows]
        command += ["--teacher", teacher, "--alpha", stage.alpha, "--iters", iters]
        command += ["--epsilon-loss"] * stage.epsilon_loss
        command += ["--warmup", min(100, iters // 4), "--seed", seed, "--batch-size", BATCH // processes]
        command += ["--data", args.data, "--name", folder.name, "--out", out, "--sample-every", 0, "--resume"]
        print(f"seed {seed}, cost {cost}: {folder.name}, {iters} updates", flush=True)
        reproduce.run([str(word) for word in command])
    return folder, total


def measure(folder: Path, steps: int, sampler: str, args: argparse.Namespace) -> dict:
    """A model's scores on the test split."""
    sd = StableDiffusion.load(folder, choose_device(None))
    row = figures.scores(sd, steps, figures.LIKENESS, sampler, TEST, args.prompts, args.images)
    clear = prompt_accuracy(sd, steps, CLEAR, TEST, args.prompts, sampler)
    return row | {f"{kind}, guidance {CLEAR:g}": accuracy for kind, accuracy in clear.items()}


def run(args: argparse.Namespace) -> None:
    if not (args.data / "made_of.json").exists():
        raise InputError(f"{args.data} holds no latents; make them: python -m tools.cache --out {args.data}")
    weights = figures.name_of(StableDiffusion.load(MINIATURE))
    # Another teacher, other flows. Absolute, since the trainer is started in the root folder.
    args.out, args.data = args.out.absolute() / weights, args.data.absolute()
    for seed, name in itertools.product(args.seeds, args.methods):
        if name in SOLVERS:
            folder, sampler, key, total = MINIATURE, name, {"method": name}, {}
        else:
            folder, nfe = trained(RUNS[name], seed, args.cost, args)
            sampler, key = "flow", {"method": name, "seed": seed, "cost of a stage": args.cost}
            total = {"training": nfe}
        key |= {"teacher": weights, "prompts": args.prompts, "images": args.images}
        for steps in RUNS[name].steps:
            if not figures.known(key | {"steps": steps}, args.json):
                row = key | {"steps": steps} | total | measure(folder, steps, sampler, args)
                figures.keep([row], args.json)


# ---- The table, and figure 4 ----------------------------------------------------------------------------------------

MARKS = "<!-- tables: python -m paper.tables --table -->\n", "<!-- end of tables -->"
COLUMNS = {"frechet": ".2f", "clip": ".2f", "one item": ".1%", "two items": ".1%"}
COLUMNS |= {f"one item, guidance {CLEAR:g}": ".1%", f"two items, guidance {CLEAR:g}": ".1%"}
HEAD = "method", "steps", "NFE", "training, million NFE", "seeds", "Frechet distance", "CLIP score"
HEAD += "prompt accuracy, one item", "two items", f"one, guidance {CLEAR:g}", f"two, guidance {CLEAR:g}", "paper's FID"


def spread(rows: list[dict], column: str, form: str) -> str:
    """Mean over seeds, and the standard deviation of a single seed."""
    values = [row[column] for row in rows if column in row]
    if not values:
        return ""
    text = f"{statistics.mean(values):{form}}"
    return text + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def table(rows: list[dict], cost: int) -> str:
    """The rows at one cost."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for key, method in METHODS.items():
        for steps, paper in method.steps.items():
            here = [row for row in rows if (row["method"], row["steps"]) == (key, steps)]
            here = [row for row in here if row.get("cost of a stage", cost) == cost]
            if here:
                training = f"{here[0]['training'] / 1e6:.2f}" if "training" in here[0] else ""
                cells = [method.name, steps, here[0]["evaluations"], training, len(here) if training else ""]
                lines.append([*cells, *(spread(here, *column) for column in COLUMNS.items()), paper])
    return figures.markdown(lines)


def draw(rows: list[dict], cost: int, file: Path) -> None:
    """Figure 4: Frechet distance over alpha, after the stages of 8 and of 4 windows, of seed 0."""
    figure, [[axis]] = figures.panels(1, 1)
    rows = [row for row in rows if (row.get("seed"), row.get("cost of a stage")) == (0, cost)]
    for windows, names in FIGURE_4.items():
        distances = {row["method"]: row["frechet"] for row in rows if row["steps"] == windows}
        points = [(alpha, distances[name]) for alpha, name in names.items() if name in distances]
        axis.plot(*zip(*points), marker="o", label=f"{windows} windows, {windows} steps")
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set(xlabel="alpha", ylabel="Frechet distance")
    figures.save(figure, file)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=list(METHODS), help="rows to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of training")
    parser.add_argument("--cost", type=int, default=COST, help="NFE of one stage of ProReflow")
    parser.add_argument("--data", type=Path, default=Path("out/latents"), help="cached latents to train on")
    parser.add_argument("--prompts", type=int, default=200, help="of each kind, for prompt accuracy")
    parser.add_argument("--images", type=int, default=2000, help="of a Frechet distance")
    parser.add_argument("--out", type=Path, default=Path("out/tables"), help="folder of the trained flows")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where rows are kept")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the page and figures from --json")
    args = parser.parse_args()
    with one_line_errors(parser, "stopped; the same command goes on where it was"):
        if not args.table:
            return run(args)
        rows = figures.read_rows(args.json)
        if not rows:
            raise InputError(f"{args.json} holds no rows yet; measure some first")
        rows = [row for row in rows if row["teacher"] == rows[-1]["teacher"]]  # of the teacher that was measured last
        write_between(figures.HERE / "README.md", MARKS, table(rows, args.cost))
        draw(rows, args.cost, figures.HERE / "figures/alpha.png")


if __name__ == "__main__":
    main()
