"""Progressive window reflow: time, windows, how to walk through them, and what each stage is trained on.

One time convention throughout: tau is an integer, 1000 is pure noise and 0 the image; t = tau / 1000. Time is cut into
K windows; a window runs from its start tau_s (the noisy side) to its end tau_e < tau_s, and tau belongs to it if
tau_e < tau <= tau_s. Other conventions in use:

    a pretrained diffusion network's own index        tau - 1, from 999 (noise) to 0
    PeRFlow, and the flows trained here               tau
    rectified flow, InstaFlow                         1 - t: 0 is noise, 1 the image

Nothing here knows of Stable Diffusion. Functions take tensors, and networks as callables (z, tau) -> tensor.
Shapes: z (B, ...), one latent per sample; tau (B,) int64, so that the samples of a batch may lie in different windows.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NOISE = 1000  # tau of pure noise
Network = Callable[[Tensor, Tensor], Tensor]  # (z, tau) -> predicted noise, or velocity


def borders(windows: int) -> list[int]:
    """The borders of K windows, from noise to image: [1000, ..., 0], K + 1 numbers."""
    return [round(NOISE * k / windows) for k in range(windows, -1, -1)]


@functools.cache  # made once: a transfer in every step would keep a GPU waiting
def rising_borders(windows: int, device: torch.device) -> Tensor:
    return torch.tensor(borders(windows)[::-1], device=device)


def window_of(tau: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """(start, end) of the window that each tau lies in: end < tau <= start."""
    rising = rising_borders(windows, tau.device)
    k = torch.bucketize(tau.contiguous(), rising)  # rising[k - 1] < tau <= rising[k]
    return rising[k], rising[k - 1]


def alpha_bar(alphas_cumprod: Tensor, tau: Tensor) -> Tensor:
    """Share of the signal's variance that is left at tau; tau = 0 shares the first entry of the table with tau = 1."""
    return alphas_cumprod[(tau - 1).clamp(min=0)]


def along(coefficient: Tensor, z: Tensor) -> Tensor:
    """A number per sample, (B,), made to multiply z, (B, ...)."""
    return coefficient.view(-1, *[1] * (z.ndim - 1))


def jump(a_s: Tensor, a_e: Tensor, form: str = "ddim_eps") -> tuple[Tensor, Tensor]:
    """(lambda, eta) of z_e = lambda z_s + eta eps: from start to end in one go, given the noise eps.

    "ddim_eps" is the deterministic DDIM step (Song et al. 2021, equation 12). "diff_eps" is the form of PeRFlow's SD1.5
    weights, whose eps is another quantity: gamma^2 = a_s / a_e, lambda = 1 / gamma, eta = -sqrt(1 - gamma^2) / gamma.
    """
    lam = (a_e / a_s).sqrt()
    if form == "diff_eps":
        return lam, -(1 - a_s / a_e).sqrt() * lam
    return lam, (1 - a_e).sqrt() - lam * (1 - a_s).sqrt()


def ddim(epsilon: Network, z: Tensor, alphas_cumprod: Tensor, grid: Tensor) -> Tensor:
    """Solve a diffusion model's path by DDIM steps, from each entry of the grid to the next.

    epsilon: (z, tau) -> noise. grid: falling taus, (N + 1,), or (N + 1, B) where samples differ. N evaluations.
    """
    grid = grid.to(z.device).view(len(grid), -1).expand(-1, len(z))
    for tau, following in zip(grid, grid[1:]):
        lam, eta = jump(alpha_bar(alphas_cumprod, tau), alpha_bar(alphas_cumprod, following))
        z = along(lam, z) * z + along(eta, z) * epsilon(z, tau)
    return z


def dpm_solver(epsilon: Network, z: Tensor, alphas_cumprod: Tensor, grid: Tensor) -> Tensor:
    """The same path with DPM-Solver++ 2M (Lu et al. 2022, "DPM-Solver++", algorithm 2), for sampling in few steps.

    It predicts the image and extrapolates linearly from the last two predictions, in lambda = log(signal / noise).
    The last step is of first order, as is usual for fewer than 15 steps. grid: falling taus, (N + 1,). N evaluations.
    """
    grid = grid.to(z.device)
    a = alpha_bar(alphas_cumprod, grid)
    signal, noise = a.sqrt(), (1 - a).sqrt()
    lam = (signal / noise).log()
    steps = len(grid) - 1
    before = None
    for i in range(steps):
        image = (z - noise[i] * epsilon(z, grid[i].expand(len(z)))) / signal[i]
        h = lam[i + 1] - lam[i]
        if i == 0 or i == steps - 1:
            guess = image
        else:
            guess = image + (image - before) * h / (2 * (lam[i] - lam[i - 1]))
        z = noise[i + 1] / noise[i] * z - signal[i + 1] * torch.expm1(-h) * guess
        before = image
    return z


def as_velocity(epsilon: Network, alphas_cumprod: Tensor, windows: int, form: str = "ddim_eps") -> Network:
    """A flow whose network predicts eps, as a velocity field (z, tau) -> v.

    Inside a window the path is the straight line z_t = (1 - r) z_s + r z_e, r = (t_s - t) / (t_s - t_e), along which
    v = (z_e - z_s) / (t_e - t_s) is constant. With z_e = lambda z_s + eta eps, and z_s eliminated:

        v = ((lambda - 1) z_t + eta eps) / ((t_e - t_s) (1 - r + r lambda))
    """

    def velocity(z: Tensor, tau: Tensor) -> Tensor:
        start, end = window_of(tau, windows)
        lam, eta = jump(alpha_bar(alphas_cumprod, start), alpha_bar(alphas_cumprod, end), form)
        r = (start - tau).to(lam.dtype) / (start - end)
        scale = NOISE / ((end - start) * (1 - r + r * lam))
        return along((lam - 1) * scale, z) * z + along(eta * scale, z) * epsilon(z, tau)

    return velocity


def sampling_grid(steps: int, windows: int) -> Tensor:
    """Where `steps` Euler steps through all windows begin and end: falling taus, (steps + 1,).

    Every window gets steps // windows of them, the noisiest ones one more until all are given out; within a window
    they are equally long, up to rounding. Raises ValueError for fewer steps than windows.
    """
    if steps < windows:
        raise ValueError(f"{steps} steps are fewer than the flow's {windows} windows; take at least {windows} steps")
    grid = [NOISE]
    for k, (start, end) in enumerate(zip(borders(windows), borders(windows)[1:])):
        n = steps // windows + (k < steps % windows)
        grid += [round(start + (end - start) * i / n) for i in range(1, n + 1)]
    return torch.tensor(grid)


def euler(velocity: Network, z: Tensor, grid: Tensor) -> Tensor:
    """Walk along a velocity field: z + (t' - t) v, from each entry of the grid to the next.

    grid: falling taus, (N + 1,), or (N + 1, B) where samples differ. N evaluations.
    """
    grid = grid.to(z.device).view(len(grid), -1).expand(-1, len(z))
    for tau, following in zip(grid, grid[1:]):
        z = z + along((following - tau).to(z.dtype) / NOISE, z) * velocity(z, tau)
    return z


# ---- What a stage is trained on -------------------------------------------------------------------------------------


def solver_grid(tau: Tensor, windows: int, steps: int) -> Tensor:
    """The grid on which the window of each tau is solved in `steps` steps: falling taus, (steps + 1, B).

    It is part of one fine grid over the whole path, round(1000 j / (windows steps)), so that every step ends exactly
    where the next begins. The paper's first stage: 8 windows of 4 steps, of the teacher's 32. In a merging stage the
    steps are the windows of the previous student, 2 to a merged window.
    """
    k = torch.bucketize(tau.contiguous(), rising_borders(windows, tau.device))  # window: border k down to k - 1
    down = torch.arange(steps + 1, device=tau.device)[:, None]
    return rising_borders(windows * steps, tau.device)[k * steps - down]


def start_on_path(velocity: Network, noise: Tensor, tau: Tensor, windows: int) -> Tensor:
    """Where a flow's own path from noise is when the window of each tau begins. windows - 1 evaluations."""
    start, _ = window_of(tau, windows)
    falling = rising_borders(windows, tau.device)[1:].flip(0)
    return euler(velocity, noise, falling[:, None].clamp(min=start))  # once there, steps have no length


def solve_window(
    solve: Callable[[Tensor, Tensor], Tensor],
    z_0: Tensor,
    noise: Tensor,
    tau: Tensor,
    windows: int,
    steps: int,
    alphas_cumprod: Tensor,
    walked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The teacher's way through the window of each tau, as (start, end, z_s, z_e): its borders (B,) and what is there.

    Every sample starts at the noisy end of its window, as an image z_0 with that much noise: at a border of windows
    the previous student's path has the same distribution. solve(z, grid) leads from there to the window's other end:

        first stage      lambda z, grid: ddim(teacher_epsilon, z, alphas_cumprod, grid)
        merging stages   lambda z, grid: euler(previous_velocity, z, grid)

    walked: what the first samples start from instead, see `start_on_path`.
    """
    grid = solver_grid(tau, windows, steps)
    a = alpha_bar(alphas_cumprod, grid[0])
    z_s = along(a.sqrt(), z_0) * z_0 + along((1 - a).sqrt(), z_0) * noise
    if walked is not None:
        z_s = torch.cat([walked, z_s[len(walked) :]])
    return grid[0], grid[-1], z_s, solve(z_s, grid)


def straight_line(start: Tensor, end: Tensor, z_s: Tensor, z_e: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """What the student is shown and should answer at tau, a time of that window: (z_t, v), both like z_s."""
    r = along((start - tau).to(z_s.dtype) / (start - end), z_s)
    v = (z_e - z_s) * along(NOISE / (end - start).to(z_s.dtype), z_s)
    return (1 - r) * z_s + r * z_e, v


def training_triple(
    solve: Callable[[Tensor, Tensor], Tensor],
    z_0: Tensor,
    noise: Tensor,
    tau: Tensor,
    windows: int,
    steps: int,
    alphas_cumprod: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both in one: a path solved for each tau, and the point on its straight line at that tau, (z_t, v)."""
    return straight_line(*solve_window(solve, z_0, noise, tau, windows, steps, alphas_cumprod), tau)
