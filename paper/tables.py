"""The paper's tables in miniature: every method trained at equal cost, with several seeds, scored on the test split.

    python data.py cache --out out/latents                   first, once: what is trained on
    python experiments.py                                    all methods, three seeds: 7 hours on two cores
    python experiments.py --methods ddim dpm++               some of it: the teacher itself
    OMP_NUM_THREADS=1 python experiments.py --seeds 0 &      on one core, beside those of other rows: a quarter faster
    python experiments.py --methods perflow i --cost 30000   the same at less cost: a point of the curve
    python experiments.py --methods eight-0 eight-1 four-1   points of figure 4: other alphas, 8 and 4 windows
    python experiments.py --table                            what came out, into the README and docs/figures

Cost is counted in evaluations of a network for one sample: the teacher's steps, and three for each point shown to the
student, since a backward pass takes twice as long as a forward pass. Earlier stages count, too. A run may be
interrupted and repeated: what is there is not done again. Read `train.py` and `figures.py` first.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import sample
import train
from miniature import train as miniature
from model import MINIATURE, StableDiffusion
from paper import figures
from support.errors import InputError, one_line_errors
from support.files import fingerprint, write_between
from support.runs import start_training

ROOT = Path(__file__).parent
POINTS = 64  # shown to the student in an update, of 16 paths with 4 points each or of 64 with one
GUIDANCE = 2.0  # when sampling; chosen on validation images of the teacher, see the README
CLEAR = 4.0  # a second one, where prompts are kept to best: the default of sample.py


@dataclass(frozen=True)
class Stage:
    """One run of train.py; `share` is its part of the cost, in that of one stage of ProReflow."""

    windows: int
    share: float = 1
    alpha: float = 0.1
    starts: float = 0.75
    points: int = 1  # of each solved path
    guidance: float = 1.0  # of the teacher's paths

    def __str__(self) -> str:
        """Its name in the folder of results: what differs from the defaults."""
        default = Stage(self.windows)
        fields = ("share", "alpha", "starts", "points", "guidance")
        told = [f"{name}{getattr(self, name):g}" for name in fields if getattr(self, name) != getattr(default, name)]
        return "-".join([f"w{self.windows}", *told])

    def cost_of_update(self, teacher_windows: int | None) -> int:
        """Evaluations of the teacher and of the student in one update."""
        steps = (teacher_windows or train.TEACHER_STEPS) // self.windows
        return POINTS // self.points * train.evaluations_of_path(steps, self.points, self.guidance)


@dataclass(frozen=True)
class Method:
    """A row of the table: its stages, one after the other, the steps it is sampled in, and the paper's FID for each,
    of table 2 (COCO-2014) and of tables 1 and 4 (COCO-2017), where there is one."""

    name: str
    stages: tuple[Stage, ...]
    steps: dict[int, tuple[float | None, float | None]]


EIGHT, FOUR, TWO, ONE = Stage(8), Stage(4), Stage(2), Stage(1)
ALL, HALF, EVEN = {"starts": 1.0}, {"starts": 0.5, "points": 4}, {"starts": 0.0, "points": 4}
# Guidance is learned first, in windows of one step each; what comes after needs none any more. See the README.
GUIDED = (Stage(32, 0.5, starts=1, guidance=GUIDANCE), Stage(8, 0.5), FOUR)
METHODS = {
    "perflow": Method("PeRFlow: 4 windows at once, plain loss", (Stage(4, 2, 0),), {4: (12.01, 23.81)}),
    "i": Method("**ProReflow-I**: 8, then 4 windows", (EIGHT, FOUR), {4: (11.16, 22.97)}),
    "at-once": Method("without progressive reflow", (Stage(4, 2),), {4: (None, 23.46)}),
    "plain": Method("without the direction's loss", (Stage(8, alpha=0), Stage(4, alpha=0)), {4: (None, 23.09)}),
    "ii": Method("**ProReflow-II**: 8, 4, 2 windows", (EIGHT, FOUR, TWO), {4: (10.70, 22.03), 2: (15.44, 27.59)}),
    "two": Method("2 windows at once, plain loss", (Stage(2, 3, 0),), {2: (None, None)}),
    "one": Method("one step: 8, 4, 2, 1 windows", (EIGHT, FOUR, TWO, ONE), {1: (None, None)}),
    "reflow": Method("reflow: 1 window at once, plain loss", (Stage(1, 4, 0),), {1: (None, None)}),
    "perflow-half": Method("PeRFlow, half of the points at starts", (Stage(4, 2, 0, **HALF),), {4: (None, None)}),
    "i-half": Method(
        "ProReflow-I, half of the points at starts", (Stage(8, **HALF), Stage(4, **HALF)), {4: (None, None)}
    ),
    "perflow-even": Method("PeRFlow, even times, as published", (Stage(4, 2, 0, **EVEN),), {4: (12.01, 23.81)}),
    "i-even": Method(
        "ProReflow-I, even times, as published", (Stage(8, **EVEN), Stage(4, **EVEN)), {4: (11.16, 22.97)}
    ),
    "i-starts": Method("ProReflow-I, starts alone", (Stage(8, **ALL), Stage(4, **ALL)), {4: (None, None)}),
    "perflow-starts": Method("PeRFlow, starts alone", (Stage(4, 2, 0, **ALL),), {4: (None, None)}),
    "i-guided": Method("on guided paths: 32, 8, 4 windows", GUIDED, {4: (None, None)}),
    "ii-guided": Method("on guided paths: 32, 8, 4, 2 windows", (*GUIDED, TWO), {2: (None, None)}),
    "one-guided": Method("on guided paths: 32, 8, 4, 2, 1 windows", (*GUIDED, TWO, ONE), {1: (None, None)}),
}
ALPHAS = (0.0, 0.01, 0.1, 1.0, 10.0)
FIGURE_4 = {f"eight-{a:g}": Method(f"8 windows, alpha {a:g}", (Stage(8, alpha=a),), {8: (None, None)}) for a in ALPHAS}
FIGURE_4 |= {
    f"four-{a:g}": Method(f"8, then 4 windows, alpha {a:g}", (Stage(8, alpha=a), Stage(4, alpha=a)), {4: (None, None)})
    for a in ALPHAS
    if a not in (0, 0.1)  # those are in the table
}
COST = 60_000  # evaluations in one stage of ProReflow: on the miniature, 134 updates of the first, 188 of the others
# The teacher itself: first what flows of 4 steps are compared with.
SOLVERS = [("ddim", 32), ("ddim", 4), ("dpm++", 4), ("ddim", 2), ("ddim", 1), ("ddim", 8), ("dpm++", 8)]
PAPER = {("ddim", 32): 10.05, ("dpm++", 4): 22.36}  # table 2


# ---- Training and scoring -------------------------------------------------------------------------------------------


def trained(method: Method, seed: int, cost: int, args: argparse.Namespace) -> tuple[Path, int]:
    """The folder of a method's flow, and its cost in evaluations; trains the stages that are not there yet."""
    folder, total, windows = args.teacher, 0, None
    out, names = args.out / f"cost-{cost}" / f"seed-{seed}", []
    for stage in method.stages:
        names.append(str(stage))
        each = stage.cost_of_update(windows)
        iters = max(round(stage.share * cost / each), 1)
        total, teacher, folder, windows = total + iters * each, folder, out / "_".join(names), stage.windows
        if folder.exists():
            continue
        cores = torch.get_num_threads()  # OMP_NUM_THREADS, else what the machine has
        processes = 1 if torch.cuda.is_available() or cores < 2 else 2
        command = ["--windows", stage.windows, "--teacher", teacher, "--name", folder.name, "--alpha", stage.alpha]
        command += ["--starts", stage.starts, "--teacher-guidance", stage.guidance]
        command += ["--iters", iters, "--warmup", min(100, iters // 4), "--seed", seed, "--points", stage.points]
        command += ["--batch-size", POINTS // stage.points // processes, "--data", args.data, "--out", out]
        command += ["--sample-every", 0, "--resume"]
        print(f"seed {seed}, cost {cost}: {folder.name}, {iters} updates", flush=True)
        if start_training(command, processes, threads=max(cores // processes, 1)).returncode:
            raise InputError(f"training {folder} ended early, see above; the same command goes on from there")
    return folder, total


def measure(sd: StableDiffusion, steps: int, sampler: str, args: argparse.Namespace) -> dict:
    """A model's scores on the test split."""
    clip, drawn = figures.reference(args.clip, args.device, miniature.TEST, args.images)
    guidance = sd.guidance_or_none(GUIDANCE)
    began = time.time()
    scores = figures.kept_to(sd, steps, guidance, sampler, miniature.TEST, args.prompts)
    scores |= figures.likeness(sd, steps, guidance, sampler, miniature.TEST, args.images, clip, drawn)
    if guidance == GUIDANCE:
        clear = figures.kept_to(sd, steps, CLEAR, sampler, miniature.TEST, args.prompts)
        scores |= {f"{kind}, guidance {CLEAR:g}": clear[kind] for kind in ("one item", "two items")}
    return scores | {"guidance": guidance, "seconds": round(time.time() - began)}


def run(args: argparse.Namespace) -> None:
    if not (args.data / "made_of.json").exists():
        raise InputError(f"{args.data} holds no latents; make them: python data.py cache --out {args.data}")
    teacher = StableDiffusion.load(args.teacher, args.device)
    weights = fingerprint(teacher.unet.conv_in.weight, teacher.unet.conv_out.weight)
    args.out /= weights  # another teacher, other flows
    sizes = {"teacher": weights, "prompts": args.prompts, "images": args.images}
    for solver, steps in SOLVERS:
        key = {"method": solver, "steps": steps, **sizes}
        if solver in args.methods and not figures.known(key, args.json):
            keep(key | measure(teacher, steps, solver, args), args.json)
    for cost in args.cost:
        for seed in args.seeds:
            for name in [name for name in args.methods if name not in sample.SAMPLERS]:
                method = (METHODS | FIGURE_4)[name]
                folder, total = trained(method, seed, cost, args)
                for steps in method.steps:
                    key = {"method": name, "steps": steps, "seed": seed, "cost of a stage": cost, **sizes}
                    if not figures.known(key, args.json):
                        scores = measure(StableDiffusion.load(folder, args.device), steps, "flow", args)
                        keep(key | {"training": total} | scores, args.json)


def keep(row: dict, file: Path) -> None:
    row = row | {"torch": torch.__version__}
    print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    figures.write_rows(file, figures.kept(file) + [row])


# ---- The table, and the curve of cost -------------------------------------------------------------------------------

MARKS = "<!-- experiments: python experiments.py --table -->\n", "<!-- end of experiments -->"
COLUMNS = {"frechet": ".2f", "clip": ".2f", "one item": ".1%", "two items": ".1%"}
COLUMNS |= {f"one item, guidance {CLEAR:g}": ".1%", f"two items, guidance {CLEAR:g}": ".1%"}
HEAD = "| method | steps | evaluations | training | seeds | Frechet | / teacher's | CLIP | one item | two items "
HEAD += f"| one, guidance {CLEAR:g} | two, guidance {CLEAR:g} | paper's FID |\n"


def of_one_teacher(rows: list[dict]) -> list[dict]:
    """Those of the teacher that was measured last: flows of different teachers say nothing of the methods."""
    return [row for row in rows if row["teacher"] == rows[-1]["teacher"]]


def spread(rows: list[dict], column: str, form: str) -> str:
    """Mean over seeds, and the standard deviation of a single seed."""
    values = [row[column] for row in rows if column in row]
    if not values:
        return ""
    text = f"{statistics.mean(values):{form}}"
    return text + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def table(rows: list[dict], cost: int) -> str:
    """The rows at one cost, as the README shows them."""
    teacher = next((row["frechet"] for row in rows if (row["method"], row["steps"]) == ("ddim", 32)), None)
    if teacher is None:
        raise InputError("the teacher itself has not been measured yet: python experiments.py --methods ddim")
    solvers = sorted(SOLVERS, key=lambda solver: (solver[0], -solver[1]))
    lines = [(sampler, sampler, n, PAPER.get((sampler, n))) for sampler, n in solvers]
    for name, method in METHODS.items():
        for n, figures_of_paper in method.steps.items():
            told = [f"{fid:.2f}" for fid in figures_of_paper if fid]
            lines.append((name, method.name, n, " / ".join(told)))
    names = {"ddim": "the teacher, DDIM", "dpm++": "the teacher, DPM-Solver++"}
    text = HEAD + "|---" * HEAD.count(" | ") + "|---|\n"
    for key, name, n, paper in lines:
        of_this = [r for r in rows if (r["method"], r["steps"]) == (key, n) and r.get("cost of a stage", cost) == cost]
        if not of_this:
            continue
        shown = [spread(of_this, column, form) for column, form in COLUMNS.items()]
        shown.insert(1, f"{statistics.mean(row['frechet'] for row in of_this) / teacher:.2f}")
        training = ["", ""]
        if "training" in of_this[0]:
            training = [f"{of_this[0]['training'] / 1e6:.2f} M", str(len(of_this))]
        first = [names.get(key, name), str(n), str(of_this[0]["evaluations"]), *training]
        text += "| " + " | ".join([*first, *shown, str(paper or "")]) + " |\n"
    return text + reached(rows, cost)


def of_shared_seeds(rows: list[dict], *names: str) -> list[dict]:
    """The rows of those seeds alone that every point of a curve has; `names` are the columns that tell its points.
    Seeds differ by more than points may."""
    seeds = {}
    for row in rows:
        seeds.setdefault(tuple(row[name] for name in names), set()).add(row["seed"])
    return [row for row in rows if all(row["seed"] in there for there in seeds.values())]


def over_cost(rows: list[dict]) -> dict[str, dict[int, float]]:
    """Mean Frechet distances at 4 steps, of PeRFlow and of ProReflow-I, by the cost of training, which rises."""
    rows = [row for row in rows if row["method"] in ("perflow", "i") and row["steps"] == 4]
    points = {"perflow": {}, "i": {}}
    for row in sorted(of_shared_seeds(rows, "method", "training"), key=lambda row: row["training"]):
        points[row["method"]].setdefault(row["training"], []).append(row["frechet"])
    return {name: {cost: statistics.mean(v) for cost, v in by_cost.items()} for name, by_cost in points.items()}


def cost_to_reach(distance: float, points: dict[int, float]) -> float | None:
    """The lowest cost at which the distance is no more than this one, on straight lines between what was measured,
    over the logarithm of cost. None where it is never reached."""
    means = list(points.items())
    if means[0][1] <= distance:
        return means[0][0]
    for (before, worse), (after, better) in zip(means, means[1:]):
        if better <= distance:
            return before * (after / before) ** ((worse - distance) / (worse - better))
    return None


def reached(rows: list[dict], cost: int) -> str:
    """At which cost PeRFlow and the progressive stages are as good as PeRFlow is in the table: a line below it."""
    points = over_cost(rows)
    at = {row["training"] for row in rows if row["method"] == "perflow" and row["cost of a stage"] == cost}
    if min(map(len, points.values())) < 2 or not at & points["perflow"].keys():
        return ""
    aim = points["perflow"][at.pop()]
    text = f"\nWith the same seeds, PeRFlow's distance of {aim:.2f} at this cost is reached"
    for name, told in ("perflow", "by PeRFlow"), ("i", "and by ProReflow-I"):
        least = cost_to_reach(aim, points[name])
        text += f" {told} " + (f"at {least / 1e6:.2f} M" if least else f"not up to {max(points[name]) / 1e6:.2f} M")
    return text + " evaluations.\n"


def curve(rows: list[dict], file: Path) -> None:
    """Frechet distance over the cost of training, PeRFlow's against the progressive stages'."""
    plt = figures.pyplot()

    figure, axis = plt.subplots(figsize=(4, 3))
    points = over_cost(rows)
    for name, by_cost in points.items():
        axis.plot(list(by_cost), list(by_cost.values()), marker="o", label=METHODS[name].name.replace("*", ""))
    axis.set_xscale("log")
    axis.set_xticks(list(points["perflow"]), [f"{cost / 1e6:.2f}" for cost in points["perflow"]])
    axis.minorticks_off()
    axis.set_xlabel("training, million evaluations")
    axis.set_ylabel("Frechet distance, 4 steps")
    axis.legend(fontsize=7)
    figures.save(figure, file)


def over_alpha(rows: list[dict], cost: int, file: Path) -> None:
    """Figure 4: Frechet distance over alpha, after the stages of 8 and of 4 windows, sampled in as many steps."""
    plt = figures.pyplot()

    figure, axis = plt.subplots(figsize=(4, 3))
    for windows in (8,), (8, 4):
        names = {}
        for alpha in ALPHAS:
            stages = tuple(Stage(w, alpha=alpha) for w in windows)
            [names[alpha]] = [name for name, method in (METHODS | FIGURE_4).items() if method.stages == stages]
        at = {"steps": windows[-1], "cost of a stage": cost}
        shown = [row for row in rows if row["method"] in names.values() and at.items() <= row.items()]
        shown = of_shared_seeds(shown, "method")
        points = {alpha: [row["frechet"] for row in shown if row["method"] == name] for alpha, name in names.items()}
        there = [alpha for alpha in ALPHAS if points[alpha]]
        means = [statistics.mean(points[alpha]) for alpha in there]
        axis.plot(there, means, marker="o", label=f"{windows[-1]} windows and steps")
    axis.set_xscale("symlog", linthresh=0.01)
    axis.set_xlabel("alpha")
    axis.set_ylabel("Frechet distance")
    axis.legend(fontsize=7)
    figures.save(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ["ddim", "dpm++", *METHODS]
    parser.add_argument("--methods", nargs="+", choices=[*everything, *FIGURE_4], default=everything, help="rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--cost", type=int, nargs="+", default=[COST], help="evaluations in one stage of ProReflow")
    parser.add_argument("--teacher", type=Path, default=MINIATURE, help="the diffusion model")
    parser.add_argument("--data", type=Path, default=Path("out/latents"), help="its cached latents")
    parser.add_argument("--prompts", type=int, default=500, help="of each kind, to judge")
    parser.add_argument("--images", type=int, default=5000, help="of a Frechet distance")
    parser.add_argument("--clip", type=Path, default=ROOT / "weights/miniature-clip")
    parser.add_argument("--out", type=Path, default=Path("out/experiments"), help="folder of the trained flows")
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/experiments.json", help="where rows are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table", action="store_true", help="no run: what --json holds, into the README")
    args = parser.parse_args()
    with one_line_errors(parser, "stopped; the same command goes on where it was"):
        if not args.table:
            run(args)
        elif not (measured := figures.kept(args.json)):
            raise InputError(f"{args.json} holds no rows yet; run the experiments first")
        else:
            rows = of_one_teacher(measured)
            write_between(figures.README, MARKS, table(rows, max(args.cost)))
            if len({row["cost of a stage"] for row in rows if row["method"] in ("perflow", "i")}) > 1:
                curve(rows, ROOT / "docs/figures/cost.png")
            if {row["method"] for row in rows} & FIGURE_4.keys():
                over_alpha(rows, max(args.cost), ROOT / "docs/figures/alpha.png")


if __name__ == "__main__":
    main()
