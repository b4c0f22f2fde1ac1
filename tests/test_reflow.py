"""The mathematics of windows, checked in float64 against answers that are known."""

import pytest
import torch

import reflow
from model import alphas_cumprod

ABAR = alphas_cumprod({}).double()
KS = [1, 2, 3, 4, 8, 16]


def noise_like(z, seed=0):
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)


Z = noise_like(torch.empty(5, 4, 3, 3, dtype=torch.float64))
EPS = noise_like(Z, 1)
TAUS = torch.arange(1, 1001)


@pytest.mark.parametrize("windows", KS)
def test_each_tau_lies_in_exactly_one_window(windows):
    falling = reflow.borders(windows)
    assert falling[0] == 1000 and falling[-1] == 0 and len(falling) == windows + 1
    start, end = reflow.window_of(TAUS, windows)
    assert ((end < TAUS) & (TAUS <= start)).all()
    inside = [((TAUS <= s) & (TAUS > e)).int() for s, e in zip(falling, falling[1:])]
    assert (sum(inside) == 1).all()


def test_borders_of_merged_windows_are_borders_of_the_finer_ones_and_of_the_teachers_grid():
    grid = set(reflow.borders(32))
    for windows in 8, 4, 2, 1:
        assert set(reflow.borders(windows)) <= set(reflow.borders(2 * windows)) and set(reflow.borders(windows)) <= grid


def test_alpha_bar_counts_from_one_and_the_image_shares_the_first_entry():
    taus = torch.tensor([0, 1, 2, 1000])
    assert torch.equal(reflow.alpha_bar(ABAR, taus), ABAR[[0, 0, 1, 999]])


@pytest.mark.parametrize("form", ["ddim_eps", "diff_eps"])
@pytest.mark.parametrize("windows", KS)
def test_the_velocity_of_a_predicted_noise_leads_along_the_line_of_the_jump(form, windows):
    """Anywhere on the line from z_s to z_e = lambda z_s + eta eps, the same eps gives v = (z_e - z_s) / (t_e - t_s)."""
    for tau in (1, 7, 333, 500, 501, 999, 1000):
        tau = torch.full((len(Z),), tau)
        start, end = reflow.window_of(tau, windows)
        lam, eta = reflow.jump(reflow.alpha_bar(ABAR, start), reflow.alpha_bar(ABAR, end), form)
        z_e = reflow.along(lam, Z) * Z + reflow.along(eta, Z) * EPS
        r = reflow.along((start - tau) / (start - end).double(), Z)
        z_t = (1 - r) * Z + r * z_e
        velocity = reflow.as_velocity(lambda z, tau: EPS, ABAR, windows, form)(z_t, tau)
        expected = (z_e - Z) / reflow.along((end - start).double() / 1000, Z)
        torch.testing.assert_close(velocity, expected, rtol=1e-9, atol=1e-9)


def test_the_two_forms_are_those_of_the_published_schedulers():
    """Numbers from the formulas themselves, for the window from tau = 1000 to 750: a_s = abar[999], a_e = abar[749]."""
    a_s, a_e = ABAR[999].item(), ABAR[749].item()
    lam, eta = reflow.jump(ABAR[999], ABAR[749], "ddim_eps")
    assert lam.item() == pytest.approx((a_e / a_s) ** 0.5)
    assert eta.item() == pytest.approx((1 - a_e) ** 0.5 - (a_e / a_s) ** 0.5 * (1 - a_s) ** 0.5)
    gamma = (a_s / a_e) ** 0.5
    lam, eta = reflow.jump(ABAR[999], ABAR[749], "diff_eps")
    assert lam.item() == pytest.approx(1 / gamma) and eta.item() == pytest.approx(-((1 - gamma**2) ** 0.5) / gamma)


def test_samples_in_different_windows_are_computed_as_if_alone():
    taus = torch.tensor([1000, 876, 875, 126, 1])
    velocity = reflow.as_velocity(lambda z, tau: z + reflow.along(tau.double() / 1000, z), ABAR, 8)
    together = velocity(Z, taus)
    for i, tau in enumerate(taus):
        torch.testing.assert_close(together[i : i + 1], velocity(Z[i : i + 1], tau[None]))


def test_a_ddim_step_keeps_the_image_and_the_noise_apart():
    """DDIM (Song et al. 2021, equation 12) step by step: predict the image, add the same noise at the next level."""
    grid = torch.tensor([1000, 969, 500, 3, 0])

    def epsilon(z, tau):
        return torch.tanh(z) * reflow.along(tau.double() / 1000, z)

    expected = Z
    for tau, following in zip(grid, grid[1:]):
        a, b = reflow.alpha_bar(ABAR, tau), reflow.alpha_bar(ABAR, following)
        eps = epsilon(expected, tau.expand(len(Z)))
        image = (expected - (1 - a).sqrt() * eps) / a.sqrt()
        expected = b.sqrt() * image + (1 - b).sqrt() * eps
    torch.testing.assert_close(reflow.ddim(epsilon, Z, ABAR, grid), expected, rtol=1e-9, atol=1e-9)


def test_a_solver_takes_a_grid_of_its_own_for_every_sample():
    grids = torch.tensor([[1000, 900, 750], [250, 100, 0], [500, 300, 250], [750, 700, 500], [1000, 2, 1]]).T

    def epsilon(z, tau):
        return torch.sin(z) * reflow.along(tau.double() / 1000, z)

    together = reflow.ddim(epsilon, Z, ABAR, grids)
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], reflow.ddim(epsilon, Z[i : i + 1], ABAR, grids[:, i]))


@pytest.mark.parametrize("solve", [reflow.ddim, reflow.dpm_solver])
def test_a_solver_recovers_the_image_of_a_perfect_prediction(solve):
    """If the network always names the noise that is truly there, every path ends at the truth."""
    image, noise = Z, EPS
    for steps in 1, 2, 5:
        grid = torch.tensor(reflow.borders(steps))
        a = reflow.alpha_bar(ABAR, torch.tensor(1000))

        def epsilon(z, tau):
            a = reflow.along(reflow.alpha_bar(ABAR, tau), z)
            return (z - a.sqrt() * image) / (1 - a).sqrt()

        z = solve(epsilon, a.sqrt() * image + (1 - a).sqrt() * noise, ABAR, grid)
        expected = ABAR[0].sqrt() * image + (1 - ABAR[0]).sqrt() * noise
        torch.testing.assert_close(z, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("windows", KS)
def test_a_constant_velocity_is_integrated_exactly_by_any_number_of_steps(windows):
    for steps in range(windows, 2 * windows + 2):
        end = reflow.euler(lambda z, tau: EPS, Z, reflow.sampling_grid(steps, windows))
        torch.testing.assert_close(end, Z - EPS, rtol=1e-12, atol=1e-12)


def test_a_flows_own_path_stops_where_the_window_of_each_tau_begins():
    def velocity(z, tau):
        return 0.3 * z + reflow.along(tau / 1000, z)

    found = reflow.start_on_path(velocity, Z, torch.tensor([1000, 751, 750, 400, 1]), windows=4)
    for i, passed in enumerate(([], [], [1000], [1000, 750], [1000, 750, 500])):
        z = Z[i : i + 1]
        for start in passed:
            z = z - 0.25 * velocity(z, torch.tensor([start]))
        torch.testing.assert_close(found[i : i + 1], z)


@pytest.mark.parametrize("windows", KS)
def test_a_fresh_student_jumps_as_the_teacher_does(windows):
    """In the form ddim_eps, one Euler step per window of an untrained flow is one DDIM step of the diffusion model."""

    def epsilon(z, tau):
        return torch.cos(z) * reflow.along(tau.double() / 1000, z)

    student = reflow.euler(reflow.as_velocity(epsilon, ABAR, windows), Z, reflow.sampling_grid(windows, windows))
    teacher = reflow.ddim(epsilon, Z, ABAR, torch.tensor(reflow.borders(windows)))
    torch.testing.assert_close(student, teacher, rtol=1e-9, atol=1e-9)


def test_left_over_steps_go_to_the_noisiest_windows():
    assert reflow.sampling_grid(4, 4).tolist() == [1000, 750, 500, 250, 0]
    assert reflow.sampling_grid(6, 4).tolist() == [1000, 875, 750, 625, 500, 250, 0]
    assert reflow.sampling_grid(4, 2).tolist() == [1000, 750, 500, 250, 0]
    assert reflow.sampling_grid(5, 2).tolist() == [1000, 833, 667, 500, 250, 0]


def test_fewer_steps_than_windows_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="3 steps are fewer than the flow's 4 windows; take at least 4 steps"):
        reflow.sampling_grid(3, 4)


def test_nothing_is_sent_to_the_host_or_looped_over_samples():
    """On the meta device any look at a value fails; and the number of network calls is that of the steps."""
    calls = []
    z, abar = torch.empty(7, 4, 8, 8, device="meta"), torch.empty(1000, device="meta")

    def epsilon(z, tau):
        calls.append(tau.shape)
        return z

    tau = torch.empty(7, dtype=torch.int64, device="meta")
    assert reflow.as_velocity(epsilon, abar, 8)(z, tau).shape == z.shape
    assert reflow.ddim(epsilon, z, abar, torch.empty(5, 7, dtype=torch.int64, device="meta")).shape == z.shape
    assert calls == [torch.Size([7])] * 5


# ---- what a stage is trained on ----


def some_epsilon(z, tau):
    return torch.sin(z) * reflow.along(tau.double() / 1000, z)


@pytest.mark.parametrize("windows, steps", [(8, 4), (4, 2), (2, 2), (1, 2), (4, 8), (1, 32), (3, 5)])
def test_the_solvers_grid_runs_from_border_to_border_on_one_fine_grid(windows, steps):
    grid = reflow.solver_grid(TAUS, windows, steps)
    start, end = reflow.window_of(TAUS, windows)
    assert grid.shape == (steps + 1, 1000) and torch.equal(grid[0], start) and torch.equal(grid[-1], end)
    assert set(grid.flatten().tolist()) == set(reflow.borders(windows * steps))


def test_the_teachers_grid_is_that_of_32_steps_over_the_whole_path():
    """1000 / 32 is not whole: counting back in steps of 31 would miss every border but the first."""
    assert reflow.solver_grid(torch.tensor([1000, 1]), 8, 4).T.tolist() == [
        [1000, 969, 938, 906, 875],
        [125, 94, 62, 31, 0],
    ]


@pytest.mark.parametrize("windows, steps", [(8, 4), (4, 2), (1, 2)])
def test_a_training_sample_lies_on_the_line_between_the_ends_of_its_window(windows, steps):
    tau = torch.tensor([1000, 876, 500, 126, 1])
    ends = []

    def solve(z, grid):
        ends[:] = [z, reflow.ddim(some_epsilon, z, ABAR, grid)]
        return ends[1]

    z_t, v = reflow.training_triple(solve, Z, EPS, tau, windows, steps, ABAR)
    start, end = reflow.window_of(tau, windows)
    a = reflow.along(reflow.alpha_bar(ABAR, start), Z)
    torch.testing.assert_close(ends[0], a.sqrt() * Z + (1 - a).sqrt() * EPS)
    to_start, to_end = (reflow.along((border - tau).double() / 1000, Z) for border in (start, end))
    torch.testing.assert_close(z_t + to_start * v, ends[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(z_t + to_end * v, ends[1], rtol=1e-9, atol=1e-9)


def test_the_target_of_a_merged_window_is_its_two_halves_one_after_the_other():
    previous = reflow.as_velocity(some_epsilon, ABAR, 8)
    tau, halves = torch.tensor([1000, 900, 750]), []
    z_s = {}

    def solve(z, grid):
        z_s["start"] = z
        return reflow.euler(previous, z, grid)

    z_t, v = reflow.training_triple(solve, Z[:3], EPS[:3], tau, 4, 2, ABAR)
    for start, end in ((1000, 875), (875, 750)):
        z = halves[-1] if halves else z_s["start"][:2]
        step = previous(z, torch.full((2,), start)) * (end - start) / 1000
        halves.append(z + step)
    expected = (halves[-1] - z_s["start"][:2]) / -0.25
    torch.testing.assert_close(v[:2], expected, rtol=1e-9, atol=1e-9)


def test_a_student_that_answers_the_target_arrives_where_the_teacher_does():
    """One window: the student's single jump along v ends where 32 DDIM steps of the teacher end."""
    grid = torch.tensor(reflow.borders(32))
    tau = torch.full((5,), 1000)
    z_s, v = reflow.training_triple(lambda z, grid: reflow.ddim(some_epsilon, z, ABAR, grid), Z, EPS, tau, 1, 32, ABAR)
    expected = reflow.ddim(some_epsilon, z_s, ABAR, grid)
    torch.testing.assert_close(reflow.euler(lambda z, tau: v, z_s, reflow.sampling_grid(1, 1)), expected)
