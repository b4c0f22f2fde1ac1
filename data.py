"""What a stage trains on: samples in an order that depends on a seed and nothing else, made ready for the networks.

Training sees sample number 0, 1, 2, ... without end. Which image that is, and every random draw for it, follow from
(seed, number) alone: not from the number of processes, nor from interruptions. So the number of samples seen is all
that a checkpoint has to remember, and two processes train on what one would have.

Images come from a source (`support/datasets.py`): drawn scenes, a folder of images, tar shards, or latents, which are
encoded beforehand:

    python -m tools.cache --out out/latents                                      of drawn scenes
    torchrun --nproc-per-node 8 -m tools.cache --model DIR --data DIR --out DIR  of images, by 8 processes

Shapes: B batch, h w latents. Read `train.py` next.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

import reflow
from support.datasets import Images, Shards, open_source
from support.latents import Latents, check_vae
from support.loader import load
from support.streams import CROP, NOISE, ORDER, POSTERIOR, TIME, UNCOND, stream


class Samples(Dataset):
    """Sample number n of a stage: an item of the source, and the random draws that training makes for it.

    noise (4, h, w) is where its trajectory starts; posterior (4, h, w) draws its latent from the VAE's distribution;
    uncond says that its caption is dropped. tau is uniform in 1..1000. With probability `starts`, it is moved to the
    start of its window; the others leave out the last share `gap` of each window. Each of the four has its own stream,
    keyed by the stage's number of windows, too (`support/streams.py`).
    """

    def __init__(self, source: Dataset, seed: int, latent_shape: tuple[int, ...], windows: int, starts=0.0, gap=0.0):
        self.source, self.seed, self.shape, self.windows = source, seed, latent_shape, windows
        self.starts, self.gap = starts, gap
        self.rising = np.array(reflow.boundaries(windows)[::-1])
        self.epoch, self.order = None, None

    def item(self, n: int) -> dict:
        if self.source.endless:
            return self.source[n]
        epoch, place = divmod(n, len(self.source))
        if epoch != self.epoch:  # every image once before any comes again, each time in another order
            self.epoch = epoch
            shuffle = stream(ORDER, self.seed, epoch, self.windows)
            shards = isinstance(self.source, Shards)
            self.order = self.source.order(shuffle) if shards else shuffle.permutation(len(self.source))
        i = int(self.order[place])
        if isinstance(self.source, Images):
            return self.source.item(i, stream(CROP, self.seed, n, self.windows))
        return self.source[i]

    def __getitem__(self, n: int) -> dict:
        time, noise, posterior, uncond = (
            stream(purpose, self.seed, n, self.windows) for purpose in (TIME, NOISE, POSTERIOR, UNCOND)
        )
        tau = time.integers(1, reflow.NOISE + 1)
        start = self.rising[np.searchsorted(self.rising, tau)]
        share = 0 if time.random() < self.starts else 1 - self.gap
        tau = start - int((start - tau) * share)
        return self.item(n) | {
            "tau": int(tau),
            "noise": torch.from_numpy(noise.standard_normal(self.shape, np.float32)),
            "posterior": torch.from_numpy(posterior.standard_normal(self.shape, np.float32)),
            "uncond": bool(uncond.random() < 0.1),
        }


def open_samples(args: argparse.Namespace, sd) -> Samples:
    """The samples that train.py's options name, for the model `sd`. Latents keep their size; images get the model's."""
    size = sd.image_size()
    source = open_source(args.data, size, args.augment)
    latent_shape = sd.unet.cfg.in_channels, size // sd.downscale, size // sd.downscale
    if isinstance(source, Latents):
        check_vae(args.data, sd.vae)
        latent_shape = tuple(source[0]["mean"].shape)
    return Samples(source, args.seed, latent_shape, args.windows, args.starts, args.gap)


def batches(samples: Samples, first: int, count: int, size: int, rank: int, world: int, workers: int) -> Iterator[dict]:
    """Batches number first, first + 1, ... of this process, `count` of them.

    Batch b of all processes together has the samples from b * world * size on; this one's share are `size` neighbors.
    """
    starts = range((first * world + rank) * size, ((first + count) * world + rank) * size, world * size)
    return load(samples, [range(start, start + size) for start in starts], workers)


def prepare(sd, items: dict, device: torch.device) -> dict:
    """A batch of samples, ready for the networks of `sd`, a `model.StableDiffusion`.

    z_0 (B, 4, h, w): latents at the UNet's scale; noise, like z_0; tau (B,); conditions: those of the captions.
    """
    # Read before they move: on a GPU, each of these looks would wait for all work that is under way there.
    captions = ["" if uncond else caption for caption, uncond in zip(items["caption"], items["uncond"])]
    items = {name: x.to(device, non_blocking=True) if torch.is_tensor(x) else x for name, x in items.items()}
    if "image" in items:
        items["mean"], items["log_variance"] = sd.encode_moments(items["image"])
    deviation = (0.5 * items["log_variance"].float()).exp()
    z_0 = (items["mean"].float() + deviation * items["posterior"]) * sd.vae.cfg.scaling_factor
    context, pooled, time_ids = sd.conditions(captions, *(n * sd.downscale for n in z_0.shape[2:]))
    if time_ids is not None:
        time_ids = items.get("time_ids", time_ids)
    return {"z_0": z_0, "noise": items["noise"], "tau": items["tau"], "conditions": (context, pooled, time_ids)}
