"""Prompt accuracy: the share of prompts of which an image shows all that they say. A program reads the images back.

    python -m miniature.judge weights/proreflow-i --steps 4 --guidance 2 4

Read `support/scenes.py` for how. `python -m paper.figures score` adds a Frechet distance and a CLIP score.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

import sample
from model import MINIATURE, StableDiffusion
from support import scenes
from support.devices import choose_device
from support.errors import Parser, one_line_errors

SPLITS = {"validation": scenes.VALIDATION, "test": scenes.TEST}  # settings are chosen on one, reported on the other


def images_of(
    sd: StableDiffusion, prompts: list[str], steps: int, guidance_scale: float, seed: int, sampler: str | None = None
) -> Iterator[np.ndarray]:
    """Images of the prompts, uint8 (64, 64, 3), one after the other; image i has noise (seed, i)."""
    for first in tqdm(range(0, len(prompts), 100), desc=f"{steps} steps, guidance {guidance_scale:g}", leave=False):
        few = prompts[first : first + 100]
        indices = list(range(first, first + len(few)))
        yield from sample.generate(sd, few, steps, guidance_scale, seed, sampler=sampler, indices=indices)


def prompt_accuracy(
    sd: StableDiffusion, steps: int, guidance_scale: float, seed: int, count: int, sampler: str | None = None
) -> dict[str, float]:
    """Prompt accuracy on `count` prompts of this seed that name one item, and on `count` that name two."""
    accuracy = {}
    for kind, named in ("one item", 1), ("two items", 2):
        prompts = [scenes.prompt(seed, i, named) for i in range(count)]
        images = images_of(sd, prompts, steps, guidance_scale, seed, sampler)
        accuracy[kind] = sum(map(scenes.judge, images, prompts)) / count
    return accuracy


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MINIATURE, help="model folder")
    parser.add_argument("--steps", type=int, nargs="+", default=[32], help="one or more numbers of steps")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0], help="one or more guidance scales")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="which prompts and noise")
    parser.add_argument("--count", type=int, default=200, help="number of prompts of each kind")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")
    args = parser.parse_args()
    with one_line_errors(parser):
        sd = StableDiffusion.load(args.model, choose_device(args.device))
        for steps, scale in itertools.product(args.steps, args.guidance):
            one, two = prompt_accuracy(sd, steps, scale, SPLITS[args.split], args.count).values()
            print(f"{steps} steps, guidance {scale:g}: one item {one:.1%}, two items {two:.1%}", flush=True)


if __name__ == "__main__":
    main()
