"""The decomposed velocity loss, checked against answers that are known."""

import pytest
import torch
import torch.nn.functional as F

from loss import decompose, decomposed_velocity_loss

generator = torch.Generator().manual_seed(0)
A, B = (torch.randn(6, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))


def test_stretching_is_all_magnitude_turning_all_direction_and_both_are_the_squared_error():
    a, b = A.flatten(1), B.flatten(1)
    magnitude, direction = decompose(a, 3 * a)
    torch.testing.assert_close(magnitude, 4 * a.square().sum(dim=1))
    assert direction.abs().max() < 1e-12 * magnitude.min()
    magnitude, direction = decompose(a, a.roll(1, dims=1))  # as long as before
    assert magnitude.max() < 1e-12 * direction.min()
    magnitude, direction = decompose(a, b)
    torch.testing.assert_close(magnitude + direction, (a - b).square().sum(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0, 0.3])
def test_the_loss_is_the_mean_square_plus_alpha_times_one_minus_the_cosine_of_whole_latents(alpha):
    pred = A.clone().requires_grad_(True)
    loss, parts = decomposed_velocity_loss(pred, B, alpha)
    mse, cos = F.mse_loss(pred, B), 1 - F.cosine_similarity(pred.flatten(1), B.flatten(1)).mean()
    expected = mse + alpha * cos
    for found, wanted in (loss, expected), (parts["mse"], mse), (parts["cos"], cos):
        torch.testing.assert_close(found, wanted, check_dtype=False)
    torch.testing.assert_close(*(torch.autograd.grad(value, pred)[0] for value in (loss, expected)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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
