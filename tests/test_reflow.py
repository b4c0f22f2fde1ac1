"""The mathematics of windows, checked in float64 against answers that are known."""

import pytest
import torch

import reflow
from model import alphas_cumprod
from reflow import append_dims

ABAR = alphas_cumprod({}).double()
KS = [1, 2, 3, 4, 8, 16]
Z, NOISE = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TAUS = torch.arange(1, 1001)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def epsilon(z, tau):
    return torch.sin(z) * append_dims(tau.double() / 1000, z)


# ---- time and windows ----


@pytest.mark.parametrize("windows", KS)
def test_each_tau_lies_in_exactly_one_window(windows):
    falling = reflow.boundaries(windows)
    assert falling[0] == 1000 and falling[-1] == 0 and len(falling) == windows + 1
    start, end = reflow.window_of(TAUS, windows)
    for s, e in zip(falling, falling[1:]):
        assert torch.equal((start == s) & (end == e), (e < TAUS) & (TAUS <= s))


def test_alpha_bar_counts_from_one_and_the_image_shares_the_first_entry():
    assert torch.equal(reflow.alpha_bar(ABAR, torch.tensor([0, 1, 2, 1000])), ABAR[[0, 0, 1, 999]])


@pytest.mark.parametrize("windows, steps", [(8, 4), (4, 2), (1, 32), (3, 5)])
def test_the_solvers_grid_runs_through_each_window_on_one_fine_grid(windows, steps):
    """So the boundaries of 4 windows are among those of 8, and these among those of the teacher's 32 steps."""
    grid = reflow.solver_grid(TAUS, windows, steps)
    start, end = reflow.window_of(TAUS, windows)
    assert grid.shape == (steps + 1, 1000) and torch.equal(grid[0], start) and torch.equal(grid[-1], end)
    assert set(grid.flatten().tolist()) == set(reflow.boundaries(windows * steps))


@pytest.mark.parametrize(
    "steps, windows, grid",
    [
        (4, 4, [1000, 750, 500, 250, 0]),
        (6, 4, [1000, 875, 750, 625, 500, 250, 0]),  # what remains goes to the noisiest windows
        (5, 2, [1000, 833, 667, 500, 250, 0]),
    ],
)
def test_every_window_is_sampled_in_equal_steps(steps, windows, grid):
    assert reflow.sampling_grid(steps, windows).tolist() == grid


# ---- walking ----


def test_ddim_predicts_the_image_and_adds_the_same_noise_at_the_next_level():
    """Song et al. 2021, equation 12; every sample on a grid of its own."""
    grids = torch.tensor([[1000, 900, 750], [250, 100, 0], [500, 300, 250], [750, 700, 500], [1000, 2, 1]]).T
    expected = Z
    for tau, following in zip(grids, grids[1:]):
        a, eps = append_dims(reflow.alpha_bar(ABAR, tau), Z), epsilon(expected, tau)
        image = (expected - (1 - a).sqrt() * eps) / a.sqrt()
        expected = reflow.add_noise(image, eps, reflow.alpha_bar(ABAR, following))
    close(reflow.ddim(epsilon, Z, ABAR, grids), expected)


@pytest.mark.parametrize("prediction_type", ["ddim_eps", "diff_eps"])
@pytest.mark.parametrize("windows", KS)
def test_the_velocity_of_a_predicted_noise_leads_along_the_line_of_its_window(prediction_type, windows):
    """Anywhere on the line from z_s to z_e = lambda z_s + eta eps, the same eps gives v = (z_e - z_s) / (t_e - t_s).

    Samples in different windows are computed together."""
    for taus in ([1, 7, 333, 500, 501], [999, 1000, 876, 875, 126]):
        tau = torch.tensor(taus)
        start, end = reflow.window_of(tau, windows)
        a_s, a_e = reflow.alpha_bar(ABAR, start), reflow.alpha_bar(ABAR, end)
        lam, eta = reflow.ddim_coefficients(a_s, a_e, prediction_type)
        z_e = append_dims(lam, Z) * Z + append_dims(eta, Z) * NOISE
        r = append_dims((start - tau) / (start - end).double(), Z)
        velocity = reflow.as_velocity(lambda z, tau: NOISE, ABAR, windows, prediction_type)
        close(velocity((1 - r) * Z + r * z_e, tau), (z_e - Z) / append_dims((end - start).double() / 1000, Z))


@pytest.mark.parametrize("windows", KS)
def test_a_constant_velocity_is_integrated_exactly_by_any_number_of_steps(windows):
    for steps in range(windows, 2 * windows + 2):
        close(reflow.euler(lambda z, tau: NOISE, Z, reflow.sampling_grid(steps, windows)), Z - NOISE)


@pytest.mark.parametrize("windows", KS)
def test_an_untrained_flow_goes_where_its_diffusion_model_goes(windows):
    """With ddim_eps, its Euler step through a window is one DDIM step."""
    student = reflow.euler(reflow.as_velocity(epsilon, ABAR, windows), Z, reflow.sampling_grid(windows, windows))
    close(student, reflow.ddim(epsilon, Z, ABAR, torch.tensor(reflow.boundaries(windows))))
