"""The paper's claims in the plane, with ten seeds: what `toy.md` reports.

    python -m paper.toy_study             measure what paper/results/toy.json lacks (about 25 minutes of one core),
                                          and draw it: paper/figures/toy_study.png
    python -m paper.toy_study --figure    only draw it
    python -m paper.toy_study --targets   the paper's figure 2, as paper/figures/toy_targets.png

A row holds the mean squared distance between the end points of a method and those of its teacher in 32 steps, from the
same noise, for each seed. Read `toy.py` first. Figures need matplotlib: pip install -r requirements-dev.txt
"""

import argparse
import functools
import json
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

import reflow
from paper import toy

FOLDER = Path(__file__).parent
SEEDS = 10
EVEN, STARTS = [0, 0], [0.5, 0.25]  # [at_start, gap]: the times of the paper, and those of toy.py
TIMES = [EVEN, [0, 0.25], [0, 0.5], [0.5, 0], STARTS, [0.75, 0.25]]
PATHS = [[4], [8, 4], [2], [8, 4, 2], [1], [8, 4, 2, 1]]  # windows: at once, and in stages
COSTS, ALPHAS, SIZES = [1500, 5000, 15000], [0, 0.01, 0.1, 1], [0.1, 0.2, 0.4, 0.8]


class Smooth(toy.Net):
    """Sees slow sinusoids only, so that it can hardly tell neighbouring times apart."""

    frequencies = torch.arange(1, 5) * torch.pi / reflow.NOISE


class SideBySide(nn.Module):
    """The networks of all seeds as one: each answers for its own equal share of the batch."""

    def __init__(self, nets: list[nn.Module]):
        super().__init__()
        stacked, _ = torch.func.stack_module_state(nets)
        self.names, parameters = zip(*stacked.items())
        self.stacked = nn.ParameterList(parameter.detach() for parameter in parameters)
        self.one = [nets[0]]  # in a list, so that its parameters are not ours

    def forward(self, z: Tensor, tau: Tensor) -> Tensor:
        def answer(parameters: list[Tensor], z: Tensor, tau: Tensor) -> Tensor:
            return torch.func.functional_call(self.one[0], dict(zip(self.names, parameters)), (z, tau))

        seeds = len(self.stacked[0])
        return torch.func.vmap(answer)(list(self.stacked), z.view(seeds, -1, 2), tau.view(seeds, -1)).flatten(0, 1)


@functools.cache
def train_teacher(features: str, updates: int) -> toy.Flow:
    torch.manual_seed(0)
    nets = SideBySide([{"sinusoids": toy.Net, "smooth": Smooth}[features]() for _ in range(SEEDS)])
    return toy.fit(f"teacher, {features}", nets, functools.partial(toy.diffusion_loss, n=256 * SEEDS), updates), 32


def train(run: dict, flow: toy.Flow) -> toy.Flow:
    """From the teacher through all stages of a run. They have equally many updates."""
    torch.manual_seed(1)
    updates = round(run["cost"] / sum(a // b + 3 for a, b in zip([flow[1], *run["path"]], run["path"])))
    for windows in run["path"]:
        loss_of = functools.partial(
            toy.reflow_loss, windows=windows, teacher=flow, alpha=run["alpha"],
            at_start=run["times"][0], gap=run["times"][1], n=128 * SEEDS,
        )  # fmt: skip
        flow = toy.fit(f"{run['path']}, {windows}", flow[0], loss_of, updates), windows
    return flow


def perturbed(velocity: reflow.Network, kind: str, size: float) -> reflow.Network:
    """Every velocity is wrong by size |v|: turned to the left or right, or too short or too long, by chance."""
    turn = 2 * torch.tensor(size / 2).asin()  # moves the tip of v by size |v|

    def noisy(z: Tensor, tau: Tensor) -> Tensor:
        v, sign = velocity(z, tau), torch.randint(2, (len(z), 1)) * 2 - 1
        if kind == "magnitude":
            return v * (1 + sign * size)
        return turn.cos() * v + sign * turn.sin() * torch.stack([-v[:, 1], v[:, 0]], dim=1)

    return noisy


def all_runs() -> list[dict]:
    runs = [
        {"path": [windows], "cost": 0, "features": name} for name in ("sinusoids", "smooth") for windows in (8, 4, 2, 1)
    ]
    runs += [{"noise": kind, "size": size} for kind in ("direction", "magnitude") for size in SIZES]
    table = [(path, cost, 0, times) for times in (EVEN, STARTS) for path in PATHS for cost in COSTS[:2]]
    table += [(path, COSTS[2], 0, times) for times in (EVEN, STARTS) for path in PATHS[:2]]
    table += [(path, 5000, alpha, times) for times in (EVEN, STARTS) for path in PATHS[:2] for alpha in ALPHAS[1:]]
    table += [([4], cost, 0, times) for cost in COSTS[1:] for times in TIMES] + [([4], 45000, 0, EVEN)]
    table = [(*row, "sinusoids") for row in table] + [([4], 15000, 0, times, "smooth") for times in (EVEN, STARTS)]
    return runs + [dict(zip(("path", "cost", "alpha", "times", "features"), row)) for row in table]


def measure(run: dict, teacher: toy.Flow, n: int) -> list[dict]:
    """The rows of a run: in as many steps as windows, in 4 and in 8."""
    noise = torch.randn(n * SEEDS, 2, generator=torch.Generator().manual_seed(2))
    goal = toy.trajectory(*teacher, 32, noise)[1][-1]
    if "noise" in run:
        torch.manual_seed(3)
        velocity = perturbed(reflow.as_velocity(teacher[0], toy.ALPHAS_CUMPROD, 32), run["noise"], run["size"])
        with torch.no_grad():
            ends = {32: reflow.euler(velocity, noise, reflow.sampling_grid(32, 32))}
    else:
        net, windows = train(run, teacher) if run["cost"] else (teacher[0], run["path"][0])
        ends = {m: toy.trajectory(net, windows, m, noise)[1][-1] for m in sorted({windows, 4, 8}) if m >= windows}
    distances = {m: (z - goal).square().sum(dim=1).view(SEEDS, n).mean(dim=1).tolist() for m, z in ends.items()}
    return [run | {"steps": m, "distance": [round(d, 5) for d in distances[m]]} for m in distances]


def study(file: Path, runs: list[dict], teacher_updates: int = 3000, n: int = 1000) -> None:
    """Add the rows that the file lacks, run by run: this can be stopped at any time, and started again."""
    rows = json.loads(file.read_text()) if file.exists() else []
    for run in runs:
        if not any(run.items() <= row.items() for row in rows):
            rows += measure(run, train_teacher(run.get("features", "sinusoids"), teacher_updates), n)
            file.write_text("[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n")


# ---- Figures --------------------------------------------------------------------------------------------------------


def figure(rows: list[dict], out: Path) -> None:
    """A panel for each question: means over seeds, with their standard errors."""
    import matplotlib.pyplot as plt

    def plot(panel: int, xs: list, wanted: list[dict], label: str, style: str) -> None:
        found = [(x, row["distance"]) for x, w in zip(xs, wanted) for row in rows if w.items() <= row.items()]
        xs, values = zip(*found) if found else ((), ())
        errors = [stdev(map(float, v)) / len(v) ** 0.5 for v in values]
        axes[panel].errorbar(xs, [*map(mean, values)], errors, fmt=style, label=label, capsize=2, markersize=4)

    fig, axes = plt.subplots(1, 5, figsize=(18, 4.4), sharey=True, width_ratios=[1, 1, 1, 1, 1.2])
    titles = "In stages or at once:\ntimes even, as in the paper", "In stages or at once:\ntimes mostly at starts"
    titles += "Weight of the direction\n(4 windows, cost 5,000)", "Noise on the velocities\nof the teacher"
    titles += ("Times in a window\n(4 windows at once, in 4 steps)",)
    names = [f"{share:.0%} at starts,\nthe last {gap:.0%} left out" for share, gap in TIMES]
    ticks = [COSTS, COSTS, range(len(ALPHAS)), SIZES, range(len(TIMES))]
    for axis, title, where, what in zip(axes, titles, ticks, [COSTS, COSTS, ALPHAS, SIZES, names]):
        axis.set(title=title, yscale="log", xscale="log" if where in (COSTS, SIZES) else "linear")
        axis.set_xticks(where, what, **({"fontsize": 7, "rotation": 40, "ha": "right"} if what is names else {}))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    labels = ["NFE of training, per sample"] * 2 + ["alpha", "noise / |v|", ""]
    for axis, label in zip(axes, labels):
        axis.set_xlabel(label)
    base = {"features": "sinusoids", "alpha": 0, "steps": 4, "cost": 5000}
    for panel, times in enumerate((EVEN, STARTS)):
        for i, path in enumerate(PATHS):
            wanted = [base | {"path": path, "steps": path[-1], "times": times, "cost": cost} for cost in COSTS]
            how = f"{path[-1]} window{'s' * (path[-1] > 1)} {'in stages' if i % 2 else 'at once'}"
            plot(panel, COSTS, wanted, how, f"C{i // 2}o{'-' if i % 2 else '--'}")
        for i, path in enumerate(PATHS[:2]):
            wanted = [base | {"path": path, "times": times, "alpha": alpha} for alpha in ALPHAS]
            label = f"{'in stages' if i else 'at once'}, times {'at starts' if panel else 'even'}"
            plot(2, ticks[2], wanted, label, f"C{3 * panel}o{'-' if i else '--'}")
    for kind in "direction", "magnitude":
        plot(3, SIZES, [{"noise": kind, "size": size} for size in SIZES], f"on the {kind}", "o-")
    for features, cost, style in (
        ("sinusoids", 0, "k:"),
        ("smooth", 15000, "C4x"),
        ("sinusoids", 5000, "C0v"),
        ("sinusoids", 15000, "C1o"),
        ("sinusoids", 45000, "C2^"),
    ):
        wanted = [
            {"path": [4], "cost": cost, "features": features, "steps": 4}
            | ({"times": times, "alpha": 0} if cost else {})
            for times in TIMES
        ]
        plot(4, ticks[4], wanted, f"{features}, cost {cost:,}" if cost else "untrained (DDIM)", style)
    for axis in axes:
        axis.legend(fontsize=7)
    axes[0].set_ylabel("squared distance from the teacher's end points")
    fig.tight_layout()
    fig.savefig(out / "toy_study.png", dpi=100)


def targets(flows: dict[str, toy.Flow], out: Path) -> None:
    """Figure 2: the straight lines that each method trains on, and where its flow takes noise. One coordinate of two."""
    import matplotlib.pyplot as plt

    columns = ["one-window reflow", "PeRFlow", "8 windows", "ProReflow-I", "ProReflow-II", "one step"]
    fig, axes = plt.subplots(2, len(columns), figsize=(15, 5), sharex=True, sharey=True)
    z_0, noise = toy.draw_data(12), torch.randn(12, 2)
    for (above, below), name in zip(axes.T, columns):
        net, windows = flows[name]
        teacher, teacher_windows = flows[toy.METHODS[name][1]]
        velocity = reflow.as_velocity(teacher, toy.ALPHAS_CUMPROD, teacher_windows)
        for start in reflow.boundaries(windows)[:-1]:
            z_s = reflow.add_noise(z_0, noise, reflow.alpha_bar(toy.ALPHAS_CUMPROD, torch.full((12,), start)))
            grid = reflow.solver_grid(torch.tensor([start]), windows, teacher_windows // windows)[:, 0]
            with torch.no_grad():
                path = torch.stack([reflow.euler(velocity, z_s, grid[: i + 1]) for i in range(len(grid))])
            above.plot(grid, path[..., 0], color="0.65", linewidth=1)
            above.plot(grid[[0, -1]], path[[0, -1], :, 0], color="C3", linewidth=1)
            above.axvline(grid[-1], color="0.9", linewidth=1, zorder=0)
        for flow, steps, color in (flows["teacher"], 32, "0.65"), (flows[name], windows, "C0"):
            grid, points = toy.trajectory(*flow, steps, noise)
            below.plot(grid, points[..., 0], color=color, linewidth=1)
        above.set_title(f"{name}\n(taught by {toy.METHODS[name][1]})", fontsize=10)
        below.set(xlabel="tau: noise to data", xlim=(reflow.NOISE, 0))
    axes[0, 0].set_ylabel("trained on (red)\nwhat its teacher does (grey)")
    axes[1, 0].set_ylabel("sampling (blue)\ndiffusion model, 32 steps (grey)")
    fig.tight_layout()
    fig.savefig(out / "toy_targets.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true", help="only draw the figure of the study")
    parser.add_argument("--targets", action="store_true", help="only draw figure 2")
    args = parser.parse_args()
    file, out = FOLDER / "results/toy.json", FOLDER / "figures"
    if args.targets:
        torch.manual_seed(0)
        return targets(toy.train_all(), out)
    if not args.figure:
        study(file, all_runs())
    figure(json.loads(file.read_text()), out)


if __name__ == "__main__":
    main()
