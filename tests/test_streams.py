"""No two purposes share random numbers: neither with each other, nor in two stages, nor training with sampling."""

import numpy as np
import pytest
from torch.utils.data import Dataset

import data
from support import scenes, streams

SEED = 7


class Endless(Dataset):
    endless = True

    def __getitem__(self, n):
        return {}


class Blank(data.Images):
    """A single image that needs no reading. So each number is an epoch, too."""

    def __len__(self):
        return 1

    def read(self, *place):
        return {}


def stage(windows):
    """What opens all streams of a stage's sample n: time, noise, posterior, uncond, order and crop."""
    endless, images = (data.Samples(source, SEED, (1,), windows) for source in (Endless(), Blank(8, augment=True)))
    return lambda n: (endless[n], images.item(n))


CALLS = [
    (lambda n: scenes.caption(SEED, n), 2),  # the scene, and what is said of it
    (lambda n: scenes.caption(SEED + 1, n), 2),
    (lambda n: scenes.caption(SEED, n, 0.4), 1),  # of the same scene
    (lambda n: scenes.prompt(SEED, n), 1),
    (lambda n: scenes.prompt(SEED, n, 2), 1),
    (lambda n: streams.draw_noise(SEED, [n], (1,)), 1),
    (lambda n: streams.stream(streams.READING, SEED, n), 1),
    (lambda n: streams.stream(streams.CONTRAST, SEED, n), 1),
    (stage(8), 6),
    (stage(4), 6),
]


def test_no_two_purposes_seeds_stages_or_numbers_share_a_stream(monkeypatch):
    """NumPy makes independent streams from different keys; (1, 2) and (1, 2, 0) are the same key."""
    keys, open_stream = set(), np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: keys.add((*key, 0, 0)[:5]) or open_stream(key))
    for n in range(50):
        for call, new in CALLS:
            before = len(keys)
            call(n)
            assert len(keys) == before + new
    purposes = {value for name, value in vars(streams).items() if name.isupper()}
    assert {key[0] for key in keys} == purposes and 0 not in purposes


def test_an_image_depends_on_seed_and_number_alone():
    together = streams.draw_noise(3, [4, 5, 6], (2, 3))
    assert all(np.array_equal(together[i], streams.draw_noise(3, [4 + i], (2, 3))[0]) for i in range(3))
    for seed in -1, 2**32:  # two words to NumPy, which could stand for another key
        with pytest.raises(ValueError, match="--seed must be from 0"):
            streams.stream(streams.NOISE, seed, 0)
