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

    fig, axes = plt.subplots(1, 5, figsize=(18, 4.4), sharey=True, width_ratios=[1, 1, 1, 1, 1.2])

    def prepare(panel: int, title: str, ticks: list, label: str = "", names: list | None = None, **scale) -> None:
        axes[panel].set(title=title, xlabel=label, yscale="log", **scale)
        axes[panel].set_xticks(ticks, names or ticks)
        axes[panel].minorticks_off()
        axes[panel].grid(alpha=0.3)

    def plot(panel: int, wanted: dict, name: str, xs: list, label: str, style: str) -> None:
        """The distances of the rows that say what is wanted, over the setting of that name."""
        found = [(i, row) for i, x in enumerate(xs) for row in rows if (wanted | {name: x}).items() <= row.items()]
        where = [i if panel in (2, 4) else xs[i] for i, _ in found]  # settings side by side, or to scale
        distances = [list(map(float, row["distance"])) for _, row in found]
        errors = [stdev(values) / len(values) ** 0.5 for values in distances]
        axes[panel].errorbar(where, [*map(mean, distances)], errors, fmt=style, label=label, capsize=2, markersize=4)

    base = {"features": "sinusoids", "alpha": 0, "steps": 4, "cost": 5000}
    for panel, (times, how) in enumerate(((EVEN, "even, as in the paper"), (STARTS, "mostly at starts"))):
        title = f"In stages or at once:\ntimes {how}"
        prepare(panel, title, COSTS, "NFE of training, per sample", xscale="log")
        for i, path in enumerate(PATHS):  # at once, in stages, at once, ...
            label = f"{path[-1]} window{'s' * (path[-1] > 1)} {'in stages' if i % 2 else 'at once'}"
            wanted = base | {"path": path, "steps": path[-1], "times": times}
            plot(panel, wanted, "cost", COSTS, label, f"C{i // 2}o{'-' if i % 2 else '--'}")
        for i, path in enumerate(PATHS[:2]):
            label = f"{'in stages' if i else 'at once'}, times {how.split(',')[0]}"
            style = f"C{3 * panel}o{'-' if i else '--'}"
            plot(2, base | {"path": path, "times": times}, "alpha", ALPHAS, label, style)
    prepare(2, "Weight of the direction\n(4 windows, 5,000 NFE)", range(len(ALPHAS)), "alpha", ALPHAS)
    prepare(3, "Noise on the velocities\nof the teacher", SIZES, "noise / |v|", xscale="log")
    for kind in "direction", "magnitude":
        plot(3, {"noise": kind}, "size", SIZES, f"on the {kind}", "o-")
    names = [f"{share:.0%} at starts,\nlast {gap:.0%} left out" for share, gap in TIMES]
    prepare(4, "Times in a window\n(4 windows at once, in 4 steps)", range(len(TIMES)), names=names)
    axes[4].tick_params(axis="x", labelsize=7, rotation=50)
    for cost, style in (5000, "C0v"), (15000, "C1o"):
        plot(4, base | {"path": [4], "cost": cost}, "times", TIMES, f"{cost:,} NFE", style)
    plot(4, base | {"path": [4], "features": "smooth"}, "times", TIMES, "5,000 NFE, smooth in time", "C4x")
    untrained = next(row for row in rows if row.get("path") == [4] and row["cost"] == 0)
    axes[4].axhline(mean(untrained["distance"]), color="black", linestyle=":", label="untrained (DDIM)")
    for axis in axes:
        axis.legend(fontsize=7, handlelength=4)  # long enough to show dashes
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
    axes[0, 0].set_ylabel("trained on (red)\nits teacher (grey)")
    axes[1, 0].set_ylabel("sampling (blue)\n32-step DDIM (grey)")
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
