"""The decomposed velocity loss ("aligned v-prediction" in the paper): errors of direction count more than of magnitude.

A velocity says where to go (direction) and how fast (magnitude). Its squared error can be split in just these two:

    |a - b|^2  =  (|a| - |b|)^2  +  2 |a| |b| (1 - cos(a, b))
                  magnitude          direction

Noise on the direction hurts images more than equally large noise on the magnitude (figure 1b), but the squared error
weighs both alike. So the paper adds weight to the second part, freed of the magnitudes in front of it:

    L = mean((v_pred - v)^2) + alpha (1 - cos(v_pred, v))

The paper's alpha is not known, nor whether its square is a sum or a mean. Shapes: B batch, D numbers of a latent.
"""

import torch
from torch import Tensor


def decomposed_velocity_loss(v_pred: Tensor, v_target: Tensor, alpha: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error plus alpha times one minus the cosine, as scalars in fp32 (float64 stays float64).

    v_pred, v_target: (B, ...). The square is averaged over all elements; the cosine is that of each sample's whole
    latent, flattened, averaged over the batch. alpha 0 is the plain loss of PeRFlow and of the paper's ablation.
    Returns the loss and its two parts, detached: "mse", and "cos" for the mean of 1 - cos, without its alpha.
    """
    if v_pred.dtype != torch.float64:  # in bf16, 1 - cos of nearly parallel vectors would be rounding and nothing else
        v_pred, v_target = v_pred.float(), v_target.float()
    a, b = v_pred.flatten(1), v_target.flatten(1)
    mse = (a - b).square().mean()
    misaligned = (1 - cosine(a, b)).mean()
    return mse + alpha * misaligned, {"mse": mse.detach(), "cos": misaligned.detach()}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between vectors (B, D) -> (B,). 0 for a zero vector, which has no direction."""
    floor = 1e-6  # keeps gradients finite there
    lengths = torch.linalg.vector_norm(a, dim=1).clamp(min=floor) * torch.linalg.vector_norm(b, dim=1).clamp(min=floor)
    return (a * b).sum(dim=1) / lengths


def decompose(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of |a - b|^2 for vectors (B, D): magnitude error and direction error, (B,) each."""
    length_a, length_b = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1)
    return (length_a - length_b).square(), 2 * length_a * length_b * (1 - cosine(a, b))
