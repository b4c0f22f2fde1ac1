"""Progressive window reflow: time, windows, how to walk through them, and what each stage is trained on.

One time convention throughout: tau is an integer, 1000 is pure noise and 0 the image; t = tau / 1000. Time is cut into
K windows. A window runs from its start tau_s (the noisy side) to its end tau_e < tau_s, and tau belongs to it if
tau_e < tau <= tau_s. Other conventions in use:

    networks, diffusion models and flows alike        tau - 1, from 999 (noise) to 0
    PeRFlow's published flows                         tau
    rectified flow, InstaFlow                         1 - t: 0 is noise, 1 the image

Nothing here knows of Stable Diffusion. Functions take tensors, and networks as callables (z, tau) -> tensor.
Shapes: z (B, ...), one latent per sample; tau (B,) int64, so that the samples of a batch may lie in different windows.
Read `loss.py` next.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NOISE = 1000  # tau of pure noise
Network = Callable[[Tensor, Tensor], Tensor]  # (z, tau) -> predicted noise, or velocity


def boundaries(windows: int) -> list[int]:
    """The boundaries of K windows, from noise to image: [1000, ..., 0], K + 1 numbers."""
    return [round(NOISE * k / windows) for k in range(windows, -1, -1)]


@functools.cache  # made once: a transfer in every step would keep a GPU waiting
def rising_boundaries(windows: int, device: torch.device) -> Tensor:
    return torch.tensor(boundaries(windows)[::-1], device=device)


def window_of(tau: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """(start, end) of the window that each tau lies in: end < tau <= start."""
    rising = rising_boundaries(windows, tau.device)
    k = torch.bucketize(tau.contiguous(), rising)  # rising[k - 1] < tau <= rising[k]
    return rising[k], rising[k - 1]


def alpha_bar(alphas_cumprod: Tensor, tau: Tensor) -> Tensor:
    """Share of the signal's variance that is left at tau; tau = 0 shares the first entry of the table with tau = 1."""
    return alphas_cumprod[(tau - 1).clamp(min=0)]


def append_dims(coefficient: Tensor, z: Tensor) -> Tensor:
    """One number per sample, (B,), in the shape that multiplies z, (B, ...)."""
    return coefficient.view(-1, *[1] * (z.ndim - 1))


def add_noise(z_0: Tensor, noise: Tensor, a: Tensor) -> Tensor:
    """The forward process: images z_0 with noise, at signal shares a (B,) (Ho et al. 2020, equation 4)."""
    return append_dims(a.sqrt(), z_0) * z_0 + append_dims((1 - a).sqrt(), z_0) * noise


def ddim_coefficients(a_s: Tensor, a_e: Tensor, prediction_type: str = "ddim_eps") -> tuple[Tensor, Tensor]:
    """(lambda, eta) of z_e = lambda z_s + eta eps: from start to end in one step, given the noise eps.

    "ddim_eps" is the deterministic DDIM step (Song et al. 2021, equation 12). "diff_eps" is the form of PeRFlow's SD1.5
    weights, whose eps is another quantity: gamma^2 = a_s / a_e, lambda = 1 / gamma, eta = -sqrt(1 - gamma^2) / gamma.
    """
    lam = (a_e / a_s).sqrt()
    if prediction_type == "diff_eps":
        return lam, -(1 - a_s / a_e).sqrt() * lam
    return lam, (1 - a_e).sqrt() - lam * (1 - a_s).sqrt()


# ---- Walking: one network evaluation (NFE) per step -----------------------------------------------------------------


def ddim(epsilon: Network, z: Tensor, alphas_cumprod: Tensor, grid: Tensor) -> Tensor:
    """Solve a diffusion model's ODE by DDIM steps, from each entry of the grid to the next.

    epsilon: (z, tau) -> noise. grid: falling taus, (N + 1,), or (N + 1, B) where samples differ.
    """
    grid = grid.to(z.device).view(len(grid), -1).expand(-1, len(z))
    for tau, following in zip(grid, grid[1:]):
        lam, eta = ddim_coefficients(alpha_bar(alphas_cumprod, tau), alpha_bar(alphas_cumprod, following))
        z = append_dims(lam, z) * z + append_dims(eta, z) * epsilon(z, tau)
    return z


def as_velocity(
    epsilon: Network, alphas_cumprod: Tensor, windows: int, prediction_type: str = "ddim_eps"
) -> Network:
    """A flow whose network predicts eps, as a velocity field (z, tau) -> v.

    Inside a window the trajectory is the straight line z_t = (1 - r) z_s + r z_e, r = (t_s - t) / (t_s - t_e), along
    which v = (z_e - z_s) / (t_e - t_s) is constant. With z_e = lambda z_s + eta eps, and z_s eliminated:

        v = ((lambda - 1) z_t + eta eps) / ((t_e - t_s) (1 - r + r lambda))
    """

    def velocity(z: Tensor, tau: Tensor) -> Tensor:
        start, end = window_of(tau, windows)
        a_s, a_e = alpha_bar(alphas_cumprod, start), alpha_bar(alphas_cumprod, end)
        lam, eta = ddim_coefficients(a_s, a_e, prediction_type)
        r = (start - tau).to(lam.dtype) / (start - end)
        scale = NOISE / ((end - start) * (1 - r + r * lam))
        return append_dims((lam - 1) * scale, z) * z + append_dims(eta * scale, z) * epsilon(z, tau)

    return velocity


def euler(velocity: Network, z: Tensor, grid: Tensor) -> Tensor:
    """Walk along a velocity field: z + (t' - t) v, from each entry of the grid to the next.

    grid: falling taus, (N + 1,), or (N + 1, B) where samples differ.
    """
    grid = grid.to(z.device).view(len(grid), -1).expand(-1, len(z))
    for tau, following in zip(grid, grid[1:]):
        z = z + append_dims((following - tau).to(z.dtype) / NOISE, z) * velocity(z, tau)
    return z


def sampling_grid(steps: int, windows: int) -> Tensor:
    """Where `steps` Euler steps through all windows begin and end: falling taus, (steps + 1,).

    Every window gets steps // windows of them; what remains goes to the noisiest windows, one each. Within a window
    they are equally long, up to rounding. Raises ValueError for fewer steps than windows.
    """
    if steps < windows:
        raise ValueError(f"{steps} steps are fewer than the flow's {windows} windows; take at least {windows} steps")
    grid = [NOISE]
    for k, (start, end) in enumerate(zip(boundaries(windows), boundaries(windows)[1:])):
        n = steps // windows + (k < steps % windows)
        grid += [round(start + (end - start) * i / n) for i in range(1, n + 1)]
    return torch.tensor(grid)


# ---- What a stage is trained on -------------------------------------------------------------------------------------
#
# Every sample starts at the noisy end of its window, as an image with that much noise: at a boundary of windows the
# previous student's trajectory has the same distribution. The teacher solves the window on its grid:
#
#     grid = solver_grid(tau, windows, steps)
#     z_s = add_noise(z_0, noise, alpha_bar(alphas_cumprod, grid[0]))
#     z_e = ddim(teacher_epsilon, z_s, alphas_cumprod, grid)        first stage: a diffusion model
#     z_e = euler(previous_velocity, z_s, grid)                     merging stages: the previous student
#     z_t, v = straight_line(grid[0], grid[-1], z_s, z_e, tau)      what the student sees, and should answer


def solver_grid(tau: Tensor, windows: int, steps: int) -> Tensor:
    """The grid on which the window of each tau is solved in `steps` steps: falling taus, (steps + 1, B).

    It is part of one fine grid over all of time, round(1000 j / (windows steps)), so that every step ends exactly where
    the next begins. The paper's first stage: 8 windows of 4 steps, of the teacher's 32. In a merging stage the steps
    are the windows of the previous student, 2 to a merged window.
    """
    k = torch.bucketize(tau.contiguous(), rising_boundaries(windows, tau.device))  # window: boundary k down to k - 1
    down = torch.arange(steps + 1, device=tau.device)[:, None]
    return rising_boundaries(windows * steps, tau.device)[k * steps - down]


def straight_line(start: Tensor, end: Tensor, z_s: Tensor, z_e: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """(z_t, v) on the straight line from z_s at start to z_e at end, at the time tau between them. Both like z_s."""
    r = append_dims((start - tau).to(z_s.dtype) / (start - end), z_s)
    v = (z_e - z_s) * append_dims(NOISE / (end - start).to(z_s.dtype), z_s)
    return (1 - r) * z_s + r * z_e, v
