"""The paper's claims in the plane, with ten seeds: what `toy.md` reports.

    python -m paper.toy_study study     measure what paper/results/toy.json lacks: up to 25 minutes of one core
    python -m paper.toy_study figure    paper/figures/toy_study.png from that file
    python -m paper.toy_study concept   paper/figures/toy_figure2.png, the paper's figure 2: targets and trajectories

A row holds the mean squared distance between the end points of a method and those of its teacher in 32 steps, from the
same noise, for each of ten seeds. Read `toy.py` first. Figures need matplotlib.
"""

import argparse
import functools
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import reflow
from paper import toy

SEEDS = 10
FOLDER = Path(__file__).parent
EVEN, STARTS = (0, 0), (0.5, 0.25)  # (at_start, gap): the paper's times, and those of toy.py
TIMES = [EVEN, (0, 0.25), (0, 0.5), (0.5, 0), STARTS, (0.75, 0.25)]


class Smooth(toy.Net):
    """Sees the time as slow sinusoids only: neighbouring times look alike."""

    frequencies = torch.arange(1, 5) * torch.pi / reflow.NOISE


NETS = {"sinusoids": toy.Net, "smooth": Smooth}


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
def teacher_of(features: str, updates: int) -> toy.Flow:
    torch.manual_seed(0)
    nets = SideBySide([NETS[features]() for _ in range(SEEDS)])
    loss_of = functools.partial(toy.diffusion_loss, n=256 * SEEDS)
    return toy.fit(f"teacher, {features}", nets, loss_of, updates), 32


def train(run: dict, teacher: toy.Flow) -> toy.Flow:
    """The flow of a run. All stages of its path have equally many updates."""
    torch.manual_seed(1)
    path = run["path"]
    updates = round(run["cost"] / sum(a // b + 3 for a, b in zip([teacher[1], *path], path)))
    at_start, gap = run["times"]
    settings = {"alpha": run["alpha"], "at_start": at_start, "gap": gap, "n": 128 * SEEDS}
    flow = teacher
    for windows in path:
        loss_of = functools.partial(toy.reflow_loss, windows=windows, teacher=flow, **settings)
        flow = toy.fit(f"{path}, {windows}", flow[0], loss_of, updates), windows
    return flow


def distances(points: Tensor, others: Tensor) -> list[float]:
    """Mean squared distance of each seed."""
    return [round(d, 5) for d in (points - others).square().sum(dim=1).view(SEEDS, -1).mean(dim=1).tolist()]


def start_noise(n: int) -> Tensor:
    return torch.randn(n * SEEDS, 2, generator=torch.Generator().manual_seed(2))


def ends(flow: toy.Flow, steps: int, n: int) -> Tensor:
    return toy.trajectory(flow[0], min(flow[1], steps), steps, start_noise(n))[1][-1]


def perturbed(velocity: reflow.Network, kind: str, size: float) -> reflow.Network:
    """Every velocity is wrong by size |v|: turned left or right, or shorter or longer, by chance."""
    turn = 2 * torch.tensor(size / 2).asin()  # a turn by this angle moves the tip of v by size |v|

    def noisy(z: Tensor, tau: Tensor) -> Tensor:
        v, sign = velocity(z, tau), torch.randint(2, (len(z), 1)) * 2 - 1
        if kind == "magnitude":
            return v * (1 + sign * size)
        return turn.cos() * v + sign * turn.sin() * torch.stack([-v[:, 1], v[:, 0]], dim=1)

    return noisy


def runs() -> list[dict]:
    """The settings of all training runs."""
    paths = [(4,), (8, 4), (2,), (8, 4, 2), (1,), (8, 4, 2, 1)]
    table = [(path, cost, 0, times) for times in (EVEN, STARTS) for path in paths for cost in (1500, 5000)]
    table += [(path, 15000, 0, times) for times in (EVEN, STARTS) for path in paths[:2]]
    table += [(p, 5000, alpha, times) for times in (EVEN, STARTS) for p in paths[:2] for alpha in (0.01, 0.1, 1)]
    table += [((4,), cost, 0, times) for cost in (5000, 15000) for times in TIMES if times not in (EVEN, STARTS)]
    table = [row + ("sinusoids",) for row in table]
    table += [((4,), 15000, 0, times, "smooth") for times in (EVEN, (0, 0.5), STARTS)]
    table += [((4,), 45000, 0, times, "sinusoids") for times in (EVEN, STARTS)]
    return [dict(zip(("path", "cost", "alpha", "times", "features"), map(listed, row))) for row in table]


def listed(value):
    return list(value) if isinstance(value, tuple) else value  # as JSON has it


def study(file: Path, runs: list[dict], teacher_updates: int = 3000, n: int = 1000) -> None:
    """Add the rows that the file lacks, one by one: it can be stopped at any time, and started again."""
    untrained = [{"path": [windows], "cost": 0, "features": name} for name in NETS for windows in (8, 4, 2, 1)]
    noise = [{"noise": kind, "size": size} for kind in ("direction", "magnitude") for size in (0.1, 0.2, 0.4, 0.8)]
    for run in untrained + noise + runs:
        rows = read(file)
        if any(run.items() <= row.items() for row in rows):
            continue
        teacher = teacher_of(run.get("features", "sinusoids"), teacher_updates)
        goal = ends(teacher, 32, n)
        if "noise" in run:
            torch.manual_seed(3)
            velocity = perturbed(reflow.as_velocity(teacher[0], toy.ALPHAS_CUMPROD, 32), run["noise"], run["size"])
            with torch.no_grad():
                points = reflow.euler(velocity, start_noise(n), reflow.sampling_grid(32, 32))
            rows.append(run | {"steps": 32, "distance": distances(points, goal)})
        else:
            flow = train(run, teacher) if run["cost"] else (teacher[0], run["path"][-1])
            for steps in sorted({flow[1], 4, 8} - set(range(flow[1]))):
                rows.append(run | {"steps": steps, "distance": distances(ends(flow, steps, n), goal)})
        file.write_text("[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n")


def read(file: Path) -> list[dict]:
    return json.loads(file.read_text()) if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["study", "figure", "concept"])
    parser.add_argument("--json", type=Path, default=FOLDER / "results/toy.json")
    parser.add_argument("--out", type=Path, default=FOLDER / "figures", help="folder of the figures")
    args = parser.parse_args()
    if args.what == "study":
        study(args.json, runs())


if __name__ == "__main__":
    main()
