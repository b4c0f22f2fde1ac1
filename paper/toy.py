"""ProReflow on one screen: noise walks to points in the plane, in 32 steps, then in 4, in 2, and in 1.

    python -m paper.toy     under a minute on two cores; writes paper/figures/toy.png and toy.webp

The whole method, with `reflow.py` and `loss.py` as they are, and a small network in place of the UNet. Read it from top
to bottom. `toy.md` says what the toy shows of the paper's claims, as measured by `toy_study.py`.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import trange

import reflow
from loss import decomposed_velocity_loss

Flow = tuple[nn.Module, int]  # a network, and its number of windows

# ---- Data: a mixture of six Gaussians, and Stable Diffusion's noise schedule ----------------------------------------

CENTERS = torch.tensor([[-1.7, 1.6], [-1.8, -1.2], [-0.7, -2.0], [1.3, -1.6], [2.2, -0.6], [1.0, 1.9]])
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, reflow.NOISE) ** 2, dim=0)


def draw_data(n: int) -> Tensor:
    return CENTERS[torch.randint(len(CENTERS), (n,))] + 0.15 * torch.randn(n, 2)


# ---- A network: (z, tau) -> the noise in z. Like the UNet, it sees the time as sinusoids ----------------------------

FREQUENCIES = torch.logspace(0, -4, 16)  # in radians per unit of tau


class Net(nn.Module):
    def __init__(self, width: int = 64, frequencies: Tensor = FREQUENCIES):
        super().__init__()
        self.register_buffer("frequencies", frequencies)
        sizes = [2 + 2 * len(frequencies), width, width, width]
        hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, z: Tensor, tau: Tensor) -> Tensor:
        angles = (tau - 1)[:, None] * self.frequencies  # networks count times from 0 to 999
        return self.layers(torch.cat([z, angles.sin(), angles.cos()], dim=1))


def fit(name: str, net: nn.Module, loss_of: Callable[[nn.Module], Tensor], updates: int, lr: float) -> nn.Module:
    """Train a copy of the network. The learning rate falls to 0 over the second half."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, 2 - 2 * i / updates))
    for _ in trange(updates, desc=f"{name:>17}"):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        schedule.step()
    return net


# ---- The teacher, a diffusion model: predict the noise. Its trajectories are curved, so it needs many steps ---------


def diffusion_loss(net: nn.Module, n: int = 256) -> Tensor:
    tau, noise = torch.randint(1, reflow.NOISE + 1, (n,)), torch.randn(n, 2)
    z = reflow.add_noise(draw_data(n), noise, reflow.alpha_bar(ALPHAS, tau))
    return (net(z, tau) - noise).square().mean()


# ---- Reflow: learn to go straight from the start of a window to the point where the teacher leaves it ---------------


def draw_times(n: int, windows: int, at_start: float, gap: float) -> Tensor:
    """A share of the times at the starts of windows; of the others, none in the last part of a window, the gap."""
    start, end = reflow.window_of(torch.randint(1, reflow.NOISE + 1, (n,)), windows)
    r = torch.rand(n) * (1 - gap) * (torch.rand(n) >= at_start)
    return start - (r * (start - end)).long()


def reflow_loss(
    net: nn.Module, windows: int, teacher: Flow, alpha: float, at_start: float = 0.5, gap: float = 0.25, n: int = 128
) -> Tensor:
    """The paper draws times evenly: at_start 0, gap 0. `toy.md` shows why we do not."""
    tau = draw_times(n, windows, at_start, gap)
    grid = reflow.solver_grid(tau, windows, teacher[1] // windows)
    with torch.no_grad():
        z_s = reflow.add_noise(draw_data(n), torch.randn(n, 2), reflow.alpha_bar(ALPHAS, grid[0]))
        z_e = reflow.euler(reflow.as_velocity(teacher[0], ALPHAS, teacher[1]), z_s, grid)
        z_t, v = reflow.straight_line(grid[0], grid[-1], z_s, z_e, tau)
    return decomposed_velocity_loss(reflow.as_velocity(net, ALPHAS, windows)(z_t, tau), v, alpha)[0]


METHODS = {  # windows, taught by, network evaluations per sample (of an update: the teacher's steps + 3), alpha
    "8 windows": (8, "teacher", 4_200, 0.1),
    "ProReflow-I": (4, "8 windows", 3_000, 0.1),
    "ProReflow-II": (2, "ProReflow-I", 3_000, 0.1),
    "one step": (1, "ProReflow-II", 3_000, 0.1),
    "PeRFlow": (4, "teacher", 7_200, 0),  # the cost of ProReflow-I
    "one-window reflow": (1, "teacher", 13_200, 0),  # the cost of one step
}


def train_all(share: float = 1) -> dict[str, Flow]:
    # The diffusion model counts as a flow of 32 windows: an Euler step through such a window is a DDIM step.
    flows = {"teacher": (fit("teacher", Net(), diffusion_loss, int(3000 * share), lr=2e-3), 32)}
    for name, (windows, taught_by, cost, alpha) in METHODS.items():
        teacher = flows[taught_by]
        updates = int(cost * share) // (teacher[1] // windows + 3)
        loss_of = partial(reflow_loss, windows=windows, teacher=teacher, alpha=alpha)
        flows[name] = fit(name, teacher[0], loss_of, updates, lr=2e-3), windows
    return flows


# ---- Sampling: Euler steps from noise to data -----------------------------------------------------------------------


@torch.no_grad()
def trajectory(net: nn.Module, windows: int, steps: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """From the noise z (B, 2): times (steps + 1,), and the points reached (steps + 1, B, 2)."""
    grid, points = reflow.sampling_grid(steps, windows), [z]
    for step in zip(grid, grid[1:]):
        points.append(reflow.euler(reflow.as_velocity(net, ALPHAS, windows), points[-1], torch.stack(step)))
    return grid, torch.stack(points)


# ---- The image: noise walks to data. Grey: the trajectories of the same network in 32 steps -------------------------

COLORS = "#4477aa", "#ee6677", "#228833", "#ccaa22", "#66bbdd", "#aa3377"  # by where the teacher takes the noise
PANELS = [("teacher", 32), ("teacher", 4), ("PeRFlow", 4), ("one-window reflow", 1)]
PANELS += [("8 windows", 8), ("ProReflow-I", 4), ("ProReflow-II", 2), ("one step", 1)]


def draw(panels: list[tuple], color: Tensor, tau: float, size: int = 600) -> Image.Image:
    """The panels (title, times, points, points in 32 steps) at tau; drawn large, then made small, for smooth lines."""
    image = Image.new("RGB", (4 * size, 2 * size), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size / 16)
    for i, (title, grid, points, fine) in enumerate(panels):
        place = torch.tensor([i % 4 + 0.5, i // 4 + 0.54]) * size
        pen.text((i % 4 * size + size / 2, i // 4 * size + 8), title, "black", font, anchor="ma")
        for x, y in CENTERS * size / 6 + place:
            pen.ellipse((x - size / 20, y - size / 20, x + size / 20, y + size / 20), "#dddddd")
        for path in (fine * size / 6 + place).transpose(0, 1):
            pen.line(path.flatten().tolist(), "#bbbbbb", width=3)
        passed = max(1, int((grid > tau).sum()))
        last, following = grid[passed - 1], grid[passed]
        now = torch.lerp(points[passed - 1], points[passed], (last - tau) / (last - following))
        for path, c in zip((torch.cat([points[:passed], now[None]]) * size / 6 + place).transpose(0, 1), color):
            pen.line(path.flatten().tolist(), COLORS[c], width=3)
            pen.circle(path[-1].tolist(), 8, COLORS[c])
    return image.resize((1200, 600), Image.Resampling.BOX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the images")
    parser.add_argument("--share", type=float, default=1, help="share of the updates")
    args = parser.parse_args()
    torch.manual_seed(0)
    flows, noise, panels = train_all(args.share), torch.randn(1000, 2), []
    ends = trajectory(*flows["teacher"], 32, noise)[1][-1]
    for name, steps in PANELS:
        net, windows = flows[name]
        grid, points = trajectory(net, min(windows, steps), steps, noise)
        distance = (points[-1] - ends).square().sum(dim=1).mean()
        title = f"{name}, {steps} steps: {distance:.3f}".replace(" 1 steps", " 1 step").replace("one step, ", "")
        panels.append((title, grid, points[:, :60], trajectory(net, windows, 32, noise[:60])[1]))
    color = torch.cdist(ends, CENTERS).argmin(dim=1)
    frames = [draw(panels, color, tau) for tau in torch.linspace(reflow.NOISE, 0, 25).tolist()]
    args.out.mkdir(parents=True, exist_ok=True)
    frames[-1].save(args.out / "toy.png")
    durations = [120] * (len(frames) - 1) + [3000]
    frames[0].save(args.out / "toy.webp", save_all=True, append_images=frames[1:], duration=durations, quality=60)


if __name__ == "__main__":
    main()
