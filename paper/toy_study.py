"""The paper's claims in the plane, with ten seeds: what `toy.md` reports.

    python -m paper.toy_study     adds to paper/results/toy.json what it lacks: about 15 minutes of one core in all

A row holds the mean squared distance between the end points of a method and those of its teacher in 32 steps, from the
same noise, for each seed. Read `toy.py` first; `toy_figures.py` draws the rows.
"""

import functools
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import reflow
from paper import toy

FILE = Path(__file__).parent / "results/toy.json"
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
    table += [([4], 5000, 0, times) for times in TIMES]
    table += [([4], 5000, alpha, times) for times in (EVEN, STARTS) for alpha in ALPHAS[1:]]
    table += [([8, 4], 5000, 0.1, times) for times in (EVEN, STARTS)]
    table = [(*row, "sinusoids") for row in table] + [([4], 5000, 0, times, "smooth") for times in (EVEN, STARTS)]
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


def main() -> None:
    study(FILE, all_runs())


if __name__ == "__main__":
    main()
