"""The paper's claims in the plane, with ten seeds: what `toy.md` reports.

    python -m paper.toy_study     measures what results/toy.json lacks (15 minutes of one core in all), then draws
                                  figures/toy_study.png, and figures/toy_targets.png (a minute: trains all of toy.py)

A row holds the mean squared distance between the end points of a method and those of its teacher in 32 steps, from the
same noise, for each seed. Read `toy.py` first.
"""

import functools
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

import reflow
from paper import figures, toy

FILE = figures.HERE / "results/toy.json"
SEEDS = 10
EVEN, STARTS = [0, 0], [0.5, 0.25]  # [at_start, gap]: the times of the paper, and those of toy.py
TIMES = [EVEN, [0, 0.25], [0, 0.5], [0.5, 0], STARTS, [0.75, 0.25]]
PATHS = [[4], [8, 4], [2], [8, 4, 2], [1], [8, 4, 2, 1]]  # windows: at once, and in stages
COSTS, ALPHAS, SIZES = [1500, 5000, 15000], [0, 0.01, 0.1, 1], [0.1, 0.2, 0.4, 0.8]


# ---- Training and measuring -----------------------------------------------------------------------------------------


class Smooth(toy.Net):
    """Sees slow sinusoids only, so that it can hardly tell neighboring times apart."""

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
    at_start, gap = run["times"]
    for windows in run["path"]:
        settings = {"windows": windows, "teacher": flow, "alpha": run["alpha"], "at_start": at_start, "gap": gap}
        loss_of = functools.partial(toy.reflow_loss, **settings, n=128 * SEEDS)
        flow = toy.fit(f"{run['path']}, {windows}", flow[0], loss_of, updates), windows
    return flow


def run_of(path: list[int], times: list[float], cost: int = 5000, alpha: float = 0, features="sinusoids") -> dict:
    return {"path": path, "cost": cost, "alpha": alpha, "times": times, "features": features}


def all_runs() -> list[dict]:
    runs = [
        {"path": [windows], "cost": 0, "features": name} for name in ("sinusoids", "smooth") for windows in (8, 4, 2, 1)
    ]
    runs += [{"noise": kind, "size": size} for kind in figures.KINDS for size in SIZES]
    for times in EVEN, STARTS:
        runs += [run_of(path, times, cost) for path in PATHS for cost in COSTS[:2]]
        runs += [run_of(path, times, COSTS[2]) for path in PATHS[:2]]
        runs += [run_of([4], times, alpha=alpha) for alpha in ALPHAS[1:]]
        runs += [run_of([8, 4], times, alpha=0.1), run_of([4], times, features="smooth")]
    return runs + [run_of([4], times) for times in TIMES]


def measure(run: dict, teacher: toy.Flow, n: int) -> list[dict]:
    """The rows of a run: in as many steps as windows, in 4 and in 8."""
    noise = torch.randn(n * SEEDS, 2, generator=torch.Generator().manual_seed(2))
    goal = toy.trajectory(*teacher, 32, noise)[1][-1]
    if "noise" in run:
        torch.manual_seed(3)
        velocity = reflow.as_velocity(teacher[0], toy.ALPHAS_CUMPROD, 32)
        velocity = figures.perturbed(velocity, run["size"], run["noise"])
        with torch.no_grad():
            ends = {32: reflow.euler(velocity, noise, reflow.sampling_grid(32, 32))}
    else:
        net, windows = train(run, teacher) if run["cost"] else (teacher[0], run["path"][0])
        ends = {m: toy.trajectory(net, windows, m, noise)[1][-1] for m in sorted({windows, 4, 8}) if m >= windows}
    distances = {m: (z - goal).square().sum(dim=1).view(SEEDS, n).mean(dim=1).tolist() for m, z in ends.items()}
    return [run | {"steps": m, "distance": [round(d, 5) for d in distances[m]]} for m in distances]


def study(file: Path, runs: list[dict], teacher_updates: int = 3000, n: int = 1000) -> None:
    """Add the rows that the file lacks, run by run: this can be stopped at any time, and started again."""
    for run in runs:
        if not figures.known(run, file):
            figures.keep(measure(run, train_teacher(run.get("features", "sinusoids"), teacher_updates), n), file)


# ---- Figures --------------------------------------------------------------------------------------------------------


def draw_study(rows: list[dict], file: Path) -> None:
    """A panel for each question: means over seeds, with their standard errors."""
    figure, [axes] = figures.panels(1, 4, height=4, sharey=True)

    def plot(axis, wanted: dict, name: str, xs: list, label: str, style: str) -> None:
        """The distances of the rows that say what is wanted, over the setting of that name."""
        found = [row for x in xs for row in rows if (wanted | {name: x}).items() <= row.items()]
        means = [mean(row["distance"]) for row in found]
        errors = [stdev(row["distance"]) / SEEDS**0.5 for row in found]
        axis.errorbar([row[name] for row in found], means, errors, fmt=style, label=label, markersize=4)

    for axis, times, how in zip(axes, (EVEN, STARTS), ("even", "mostly at starts")):
        axis.set(title=f"In stages or at once:\ntimes {how}", xlabel="NFE of training, per sample", xscale="log")
        for i, path in enumerate(PATHS):
            line, label = ("-", "in stages") if len(path) > 1 else ("--", "at once")
            wanted = {"path": path, "steps": path[-1], "times": times, "alpha": 0, "features": "sinusoids"}
            plot(axis, wanted, "cost", COSTS, f"windows: {path[-1]}, {label}", f"C{i // 2}o{line}")
            if path[-1] == 4:
                color = "C0" if times == EVEN else "C3"
                wanted = run_of(path, times) | {"steps": 4}
                plot(axes[2], wanted, "alpha", ALPHAS, f"{label}, times {how}", f"{color}o{line}")
    axes[2].set(title="Weight of the direction\n(4 windows, 5,000 NFE)", xlabel="alpha")
    axes[2].set_xscale("symlog", linthresh=0.01)
    axes[3].set(title="Noise on the velocities\nof the teacher", xlabel="noise / |v|", xscale="log")
    for kind in figures.KINDS:
        plot(axes[3], {"noise": kind}, "size", SIZES, f"on the {kind}", "o-")
    for axis, ticks in zip(axes, (COSTS, COSTS, ALPHAS, SIZES)):
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
    axes[0].set(ylabel="squared distance from the teacher's end points", yscale="log")
    figures.save(figure, file)


def draw_targets(flows: dict[str, toy.Flow], file: Path) -> None:
    """Figure 2: the straight lines that a method trains on, and where its flow takes noise. One of two coordinates."""
    columns = ["one-window reflow", "PeRFlow", "8 windows", "ProReflow-I", "ProReflow-II", "one step"]
    figure, axes = figures.panels(2, len(columns), 2.5, 2.5, sharex=True, sharey=True)
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
    axes[0, 0].set_ylabel("trained on (red)\nits teacher (gray)")
    axes[1, 0].set_ylabel("sampling (blue)\n32-step DDIM (gray)")
    figures.save(figure, file)


def main() -> None:
    study(FILE, all_runs())
    draw_study(figures.read_rows(FILE), figures.HERE / "figures/toy_study.png")
    torch.manual_seed(0)
    draw_targets(toy.train_all(), figures.HERE / "figures/toy_targets.png")


if __name__ == "__main__":
    main()
