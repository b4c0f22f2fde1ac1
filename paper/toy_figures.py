"""Two figures of the toy, with matplotlib: pip install -r requirements-dev.txt

python -m paper.toy_figures study      the rows of paper/results/toy.json, as paper/figures/toy_study.png
python -m paper.toy_figures targets    the paper's figure 2, as paper/figures/toy_targets.png: trains all of `toy.py`
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

import reflow
from paper import toy
from paper.toy_study import ALPHAS, COSTS, EVEN, FILE, PATHS, SIZES, STARTS, TIMES


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
        ("smooth", 5000, "C4x"),
        ("sinusoids", 5000, "C0v"),
        ("sinusoids", 15000, "C1o"),
        ("sinusoids", 30000, "C2^"),
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
    """Figure 2: the straight lines that a method trains on, and where its flow takes noise. One of two coordinates."""
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
    out = Path(__file__).parent / "figures"
    if sys.argv[1:] == ["study"]:
        figure(json.loads(FILE.read_text()), out)
    elif sys.argv[1:] == ["targets"]:
        torch.manual_seed(0)
        targets(toy.train_all(), out)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
