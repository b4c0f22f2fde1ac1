"""Scores of a model of drawn scenes: prompt accuracy, Frechet distance and CLIP score.

Prompt accuracy is the share of prompts of which an image shows all that they say. A program reads the images back; read
`support/scenes.py` for how. The other two are in features of the miniature's own CLIP. `python -m paper.figures score`
prints all of them.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm, trange

import fid
import sample
from evaluation.clip_score import ClipScore
from model import MINIATURE, StableDiffusion
from support import scenes

CLIP = MINIATURE.with_name("miniature-clip")
SPLITS = {"validation": scenes.VALIDATION, "test": scenes.TEST}  # settings are chosen on one, reported on the other


def images_of(
    sd: StableDiffusion, prompts: list[str], steps: int, guidance_scale: float, seed: int, sampler: str
) -> Iterator[np.ndarray]:
    """Images of the prompts, uint8 (64, 64, 3), one after the other; image i has noise (seed, i)."""
    for first in tqdm(range(0, len(prompts), 100), desc=f"{steps} steps, guidance {guidance_scale:g}", leave=False):
        few = prompts[first : first + 100]
        indices = list(range(first, first + len(few)))
        yield from sample.generate(sd, few, steps, guidance_scale, seed, sampler=sampler, indices=indices)


def prompt_accuracy(
    sd: StableDiffusion, steps: int, guidance_scale: float, seed: int, count: int, sampler: str
) -> dict[str, float]:
    """Prompt accuracy on `count` prompts of this seed that name one item, and on `count` that name two."""
    accuracy = {}
    for kind, named in ("one item", 1), ("two items", 2):
        prompts = [scenes.prompt(seed, i, named) for i in range(count)]
        images = images_of(sd, prompts, steps, guidance_scale, seed, sampler)
        accuracy[kind] = sum(map(scenes.judge, images, prompts)) / count
    return accuracy


def set_scores(
    sd: StableDiffusion, steps: int, guidance_scale: float, seed: int, count: int, sampler: str
) -> dict[str, float]:
    """Of `count` images of the seed's captions, the Frechet distance to its drawn scenes and the CLIP score."""
    clip, drawn = reference(sd.device, seed, count)
    captions = [scenes.caption(seed, i) for i in range(count)]
    images = list(images_of(sd, captions, steps, guidance_scale, seed, sampler))
    parts = [clip.similarity(images[i : i + 100], captions[i : i + 100]) for i in range(0, count, 100)]
    distance = fid.frechet_distance(*statistics(images, clip), *drawn)
    return {"frechet": round(distance, 3), "clip": round(100 * torch.cat(parts).mean().item(), 3)}


@functools.cache
def reference(device: torch.device, seed: int, count: int) -> tuple[ClipScore, tuple]:
    """The miniature's own CLIP, and the mean and covariance of so many drawn scenes in its features."""
    clip = ClipScore.load(CLIP, device)
    return clip, statistics([scenes.sample(seed, i)[0] for i in trange(count, desc="drawing scenes")], clip)


def statistics(images: list[np.ndarray], clip: ClipScore) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the images' features."""
    features = torch.cat([clip.image_features(images[i : i + 200]).cpu() for i in range(0, len(images), 200)])
    features = features.double().numpy()
    return features.mean(axis=0), np.cov(features, rowvar=False)
