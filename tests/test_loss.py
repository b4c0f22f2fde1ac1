"""The decomposed velocity loss, checked against answers that are known."""

import pytest
import torch

from loss import cosine, decompose, decomposed_velocity_loss

generator = torch.Generator().manual_seed(0)
A, B = (torch.randn(6, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))


def test_a_squared_error_is_a_magnitude_error_plus_a_direction_error():
    a, b = A.flatten(1), B.flatten(1)
    magnitude, direction = decompose(a, b)
    torch.testing.assert_close(magnitude + direction, (a - b).square().sum(dim=1), rtol=1e-12, atol=0)


def test_stretching_is_all_magnitude_and_turning_is_all_direction():
    a = A.flatten(1)
    turned = a.roll(1, dims=1)  # as long as before
    magnitude, direction = decompose(a, 3 * a)
    torch.testing.assert_close(magnitude, 4 * a.square().sum(dim=1))
    assert direction.abs().max() < 1e-12 * magnitude.min()
    magnitude, direction = decompose(a, turned)
    assert magnitude.max() < 1e-12 * direction.min()


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_equal_velocities_cost_nothing(alpha):
    loss, parts = decomposed_velocity_loss(A, A, alpha)
    assert abs(loss) < 1e-12 and parts["mse"] == 0 and abs(parts["cos"]) < 1e-12


def test_the_loss_is_the_mean_square_plus_alpha_times_one_minus_the_cosine_of_whole_latents():
    loss, parts = decomposed_velocity_loss(A, B, 0.3)
    cosines = [torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm()) for a, b in zip(A, B)]
    mse, cos = ((A - B) ** 2).sum() / A.numel(), 1 - sum(cosines) / len(cosines)
    torch.testing.assert_close(loss, mse + 0.3 * cos)
    torch.testing.assert_close(parts["mse"], mse)
    torch.testing.assert_close(parts["cos"], cos)


def test_alpha_zero_is_the_plain_squared_error():
    pred = A.clone().requires_grad_(True)
    loss, _ = decomposed_velocity_loss(pred, B, 0)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(pred, B))
    loss.backward()
    torch.testing.assert_close(pred.grad, 2 * (A - B) / A.numel())


def test_the_direction_term_pulls_sideways_only():
    """Its gradient is at right angles to the prediction: it turns the velocity and leaves its length to the square."""
    pred = A.clone().requires_grad_(True)
    (1 - cosine(pred.flatten(1), B.flatten(1))).mean().backward()
    along = (pred.grad * A).flatten(1).sum(dim=1)
    assert along.abs().max() < 1e-12 and pred.grad.abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_is_computed_in_fp32_whatever_comes_in(dtype):
    pred, target = A.to(dtype), (A + 1e-2 * B).to(dtype)
    loss, parts = decomposed_velocity_loss(pred, target, 1.0)
    expected, _ = decomposed_velocity_loss(pred.double(), target.double(), 1.0)
    assert loss.dtype == parts["cos"].dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("which", ["prediction", "target", "both"])
def test_gradients_stay_finite_for_velocities_of_zero(which):
    pred = (torch.zeros_like(A) if which != "target" else A.clone()).requires_grad_(True)
    loss, _ = decomposed_velocity_loss(pred, torch.zeros_like(B) if which != "prediction" else B, 1.0)
    loss.backward()
    assert loss.isfinite() and pred.grad.isfinite().all()


def test_the_parts_carry_no_gradient_and_stay_where_they_are():
    pred = torch.empty(3, 4, device="meta", requires_grad=True)  # on meta, a look at a value would fail
    loss, parts = decomposed_velocity_loss(pred, torch.empty(3, 4, device="meta"), 1.0)
    assert loss.requires_grad and not any(part.requires_grad for part in parts.values())
