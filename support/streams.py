"""Chance: every purpose has its own stream of random numbers, so that no two draws are ever the same by accident.

A stream is keyed (purpose, seed, number): number is that of a scene, a prompt, a training sample, an image, ...
So item n depends on (seed, n) alone: not on batches, not on the number of processes, not on earlier draws.
"""

import numpy as np
import torch
from torch import Tensor

from support.errors import InputError

# Purposes: different, and never 0, which NumPy's seeds cannot tell from nothing.
SCENE, CAPTION, DETAILED_CAPTION, PROMPT = 1, 2, 3, 4  # of drawn scenes
ORDER, CROP = 5, 6  # of an epoch; of an image
TIME, NOISE, POSTERIOR, UNCOND = 7, 8, 9, 10  # of a training sample; also keyed by the stage's number of windows
SAMPLING = 11  # the noise that an image starts from
READING, CONTRAST = 12, 13  # captions in training the miniature's CLIP
LORA = 14  # the first values of an update
REUSE = 15  # which trajectories are trained on again


def stream(purpose: int, seed: int, *numbers: int) -> np.random.Generator:
    """The random numbers of (purpose, seed, numbers), all of them below 2^32. Raises InputError for another seed.

    NumPy's, because it takes several numbers as seed: torch's CPU generator uses the lower 32 bits of one number.
    """
    if not 0 <= seed < 2**32:  # a larger one is two words to NumPy, and could stand for another key
        raise InputError(f"--seed must be from 0 to 2^32 - 1, not {seed}")
    return np.random.default_rng((purpose, seed, *numbers))


def draw_noise(seed: int, indices: list[int], shape: tuple[int, ...]) -> Tensor:
    """The noise that images number `indices` of a run start from: (B, *shape), fp32, the same on every machine."""
    draws = [stream(SAMPLING, seed, i).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(draws))
