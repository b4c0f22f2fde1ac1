"""Frechet distance between two sets of pictures, each summed up by the mean and covariance of its features."""

import numpy as np


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + Tr(C1) + Tr(C2) - 2 Tr((C1 C2)^(1/2)) for means (D,) and covariances (D, D) (Heusel et al. 2017).

    With C1 = A A^T, the product C1 C2 has the eigenvalues of the symmetric A^T C2 A, all real and none negative. So no
    matrix root is needed, whose rounding errors are complex for singular covariances.
    """
    values, vectors = np.linalg.eigh(sigma1)
    a = vectors * np.sqrt(values.clip(min=0))
    root_trace = np.sqrt(np.linalg.eigvalsh(a.T @ sigma2 @ a).clip(min=0)).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace)
