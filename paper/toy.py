"""ProReflow on one screen: noise walks to points in the plane, in 32 steps, then in 4, in 2, and in 1.

    python -m paper.toy     under a minute on two cores; writes paper/figures/toy.png and toy.webp

The whole method: `reflow.py` and `loss.py` as they are, and a small network in place of the UNet. Read from the top.
`toy.md` says which of the paper's claims hold here, as measured by `toy_study.py`.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import trange

import reflow
from loss import decomposed_velocity_loss

Flow = tuple[nn.Module, int]  # a network, and its number of windows

# ---- Data: a mixture of six Gaussians, and Stable Diffusion's noise schedule ----------------------------------------

CENTERS = torch.tensor([[-1.7, 1.6], [-1.8, -1.2], [-0.7, -2.0], [1.3, -1.6], [2.2, -0.6], [1.0, 1.9]])
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, reflow.NOISE) ** 2, dim=0)


def draw_data(n: int) -> Tensor:
    return CENTERS[torch.randint(len(CENTERS), (n,))] + 0.15 * torch.randn(n, 2)


# ---- A network: (z, tau) -> the noise in z. Like the UNet, it sees the time as sinusoids ----------------------------


class Net(nn.Module):
    frequencies = torch.logspace(0, -4, 16)  # in radians per unit of tau

    def __init__(self, width: int = 64):
        super().__init__()
        sizes = [2 + 2 * len(self.frequencies), width, width, width]
        hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, z: Tensor, tau: Tensor) -> Tensor:
        angles = (tau - 1)[:, None] * self.frequencies  # networks count times from 0 to 999
        return self.layers(torch.cat([z, angles.sin(), angles.cos()], dim=1))


def fit(name: str, net: nn.Module, loss_of: Callable[[nn.Module], Tensor], updates: int) -> nn.Module:
    """Train a copy of the network. The learning rate falls to 0 over the second half."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
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
    z = reflow.add_noise(draw_data(n), noise, reflow.alpha_bar(ALPHAS_CUMPROD, tau))
    return (net(z, tau) - noise).square().mean()


# ---- Reflow: learn to go straight from the start of a window to the point where the teacher leaves it ---------------


def reflow_loss(net: nn.Module, windows: int, teacher: Flow, alpha: float, at_start=0.5, gap=0.25, n=128) -> Tensor:
    """at_start: share of the times at the start of a window. gap: its last part, without times. The paper: 0 and 0."""
    start, end = reflow.window_of(torch.randint(1, reflow.NOISE + 1, (n,)), windows)
    r = torch.rand(n) * (1 - gap) * (torch.rand(n) >= at_start)
    tau = start - (r * (start - end)).long()
    grid = reflow.solver_grid(tau, windows, teacher[1] // windows)
    with torch.no_grad():
        z_s = reflow.add_noise(draw_data(n), torch.randn(n, 2), reflow.alpha_bar(ALPHAS_CUMPROD, grid[0]))
        z_e = reflow.euler(reflow.as_velocity(teacher[0], ALPHAS_CUMPROD, teacher[1]), z_s, grid)
        z_t, v = reflow.straight_line(grid[0], grid[-1], z_s, z_e, tau)
    return decomposed_velocity_loss(reflow.as_velocity(net, ALPHAS_CUMPROD, windows)(z_t, tau), v, alpha)[0]


METHODS = {  # windows, taught by, network evaluations per sample (of an update: the teacher's steps + 3), alpha
    "8 windows": (8, "teacher", 4_200, 0.1),
    "ProReflow-I": (4, "8 windows", 3_000, 0.1),
    "ProReflow-II": (2, "ProReflow-I", 3_000, 0.1),
    "one step": (1, "ProReflow-II", 3_000, 0.1),
    "PeRFlow": (4, "teacher", 7_200, 0),  # the cost of ProReflow-I
    "one-window reflow": (1, "teacher", 13_200, 0),  # the cost of one step
}


def train_all(share: float = 1) -> dict[str, Flow]:
    flows = {"teacher": (fit("teacher", Net(), diffusion_loss, int(3000 * share)), 32)}  # DDIM is Euler in 32 windows
    for name, (windows, taught_by, cost, alpha) in METHODS.items():
        teacher = flows[taught_by]
        loss_of = partial(reflow_loss, windows=windows, teacher=teacher, alpha=alpha)
        flows[name] = fit(name, teacher[0], loss_of, int(cost * share) // (teacher[1] // windows + 3)), windows
    return flows


# ---- Sampling: Euler steps from noise to data, and an image of the walk ----------------------------------------------


@torch.no_grad()
def trajectory(net: nn.Module, windows: int, steps: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """From the noise z (B, 2): the times (steps + 1,), and the points there (steps + 1, B, 2)."""
    velocity, grid, points = reflow.as_velocity(net, ALPHAS_CUMPROD, windows), reflow.sampling_grid(steps, windows), [z]
    for step in zip(grid, grid[1:]):
        points.append(reflow.euler(velocity, points[-1], torch.stack(step)))
    return grid, torch.stack(points)


PANELS = [("teacher", 32), ("teacher", 4), ("PeRFlow", 4), ("one-window reflow", 1)]  # in as many windows as steps
PANELS += [("8 windows", 8), ("ProReflow-I", 4), ("ProReflow-II", 2), ("one step", 1)]
COLORS = "#4477aa", "#ee6677", "#228833", "#ccaa22", "#66bbdd", "#aa3377"  # by where the teacher takes the noise


def draw(panels: list[tuple], color: Tensor, tau: float, size: int = 500) -> Image.Image:
    """Panels (title, times, points, points in 32 steps), walked until tau. Drawn twice as large, for smooth lines."""
    image = Image.new("RGB", (4 * size, 2 * size), "white")
    pen = ImageDraw.Draw(image)
    for i, (title, grid, points, fine) in enumerate(panels):
        scale, middle = size / 6.6, size * torch.tensor([i % 4 + 0.5, i // 4 + 0.55])
        pen.text((size * (i % 4 + 0.5), size * (i // 4) + 8), title, "black", anchor="ma", font_size=30)
        for center in CENTERS * scale + middle:
            pen.circle(center.tolist(), 0.3 * scale, "#dddddd")
        for path in (fine * scale + middle).transpose(0, 1):
            pen.line(path.flatten().tolist(), "#aaaaaa", width=2)
        k = max(1, int((grid > tau).sum()))  # the walk is between grid[k - 1] and grid[k]
        now = points[k - 1].lerp(points[k], (grid[k - 1] - tau) / (grid[k - 1] - grid[k]))
        for path, c in zip((torch.cat([points[:k], now[None]]) * scale + middle).transpose(0, 1), color):
            pen.line(path.flatten().tolist(), COLORS[c], width=3)
            pen.circle(path[-1].tolist(), 8, COLORS[c])
    return image.reduce(2)


def main(out: Path = Path(__file__).parent / "figures", share: float = 1) -> None:
    torch.set_num_threads(1)  # the fastest for such small tensors
    torch.manual_seed(0)
    flows, noise, panels = train_all(share), torch.randn(1000, 2), []
    ends = trajectory(*flows["teacher"], 32, noise)[1][-1]
    for name, steps in PANELS:
        grid, points = trajectory(flows[name][0], steps, steps, noise)
        title = f"{name}, NFE {steps}: {(points[-1] - ends).square().sum(dim=1).mean():.3f}"
        panels.append((title, grid, points[:, :48], trajectory(*flows[name], 32, noise[:48])[1]))
    color = torch.cdist(ends, CENTERS).argmin(dim=1)
    images = [draw(panels, color, tau) for tau in torch.linspace(reflow.NOISE, 0, 25).tolist()]
    images[-1].save(out / "toy.png")
    images[0].save(out / "toy.webp", save_all=True, append_images=images + images[-1:] * 20, duration=120, quality=20)


if __name__ == "__main__":
    main()
