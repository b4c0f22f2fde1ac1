"""Encode a data set once, for `train.py --data`, so that training does not run the VAE again and again.

python -m tools.cache --out out/latents                                      drawn scenes, for the miniature
torchrun --nproc-per-node 8 -m tools.cache --model DIR --data DIR --out DIR  captioned images, by 8 processes
"""

import argparse
from pathlib import Path

import torch

from model import MINIATURE, StableDiffusion
from support import errors
from support.datasets import open_source
from support.devices import choose_device
from support.errors import InputError, positive_int
from support.latents import Latents, cache


def main() -> None:
    parser = errors.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MINIATURE, help="whose VAE encodes")
    parser.add_argument("--out", type=Path, default=Path("out/latents"), help="folder of the latents")
    parser.add_argument("--data", type=Path, help="folder of captioned images, or tar shards; default: drawn scenes")
    parser.add_argument("--size", type=positive_int, help="height and width in pixels; default: the model's")
    parser.add_argument("--count", type=positive_int, help="how many images; default: all; 100,000 scenes")
    parser.add_argument("--workers", type=errors.count, default=0, help="processes that make images")
    args = parser.parse_args()
    with errors.one_line_errors(parser, "stopped; the same command goes on where it was"):
        sd = StableDiffusion.load(args.model, "cpu", None)
        source = open_source(args.data, sd.image_size(args.size))
        if isinstance(source, Latents):
            raise InputError(f"{args.data} holds latents already")
        count = args.count or (len(source) if args.data else 100_000)
        if args.data and count > len(source):
            raise InputError(f"--count {count} is too large: {args.data} holds {len(source)} images")
        sd.vae.to(choose_device(None), torch.float32)
        cache(sd, source, count, args.out, workers=args.workers)


if __name__ == "__main__":
    main()
