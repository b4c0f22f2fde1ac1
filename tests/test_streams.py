"""No two purposes share random numbers: neither with each other, nor in two stages, nor training with sampling."""

import numpy as np
import pytest
from torch.utils.data import Dataset

import data
from support import datasets, scenes, streams

ITEMS, SEED = 2000, 7


class Endless(Dataset):
    endless = True

    def __getitem__(self, n):
        return {}


class Blank(datasets.Images):
    """A single image that needs no reading. So each number is an epoch, too."""

    def __len__(self):
        return 1

    def read(self, *place):
        return {}


def stage(windows):
    """What opens all streams of a stage's sample n, and their names."""
    endless, images = (data.Samples(source, SEED, (1,), windows) for source in (Endless(), Blank(8, augment=True)))
    names = [f"{name} of {windows} windows" for name in "time noise posterior uncond order crop".split()]
    return lambda n: (endless[n], images.item(n)), names


CALLS = (
    (lambda n: scenes.caption(SEED, n), ["scene", "caption"]),
    (lambda n: scenes.caption(SEED + 1, n), ["scene of another seed", "caption of another seed"]),
    (lambda n: scenes.caption(SEED, n, 0.4), ["scene again", "detailed caption"]),
    (lambda n: scenes.prompt(SEED, n), ["prompt"]),
    (lambda n: scenes.prompt(SEED, n, 2), ["prompt of two items"]),
    (lambda n: streams.draw_noise(SEED, [n], (1,)), ["sampling noise"]),
    (lambda n: streams.stream(streams.READING, SEED, n), ["captions read"]),
    (lambda n: streams.stream(streams.CONTRAST, SEED, n), ["captions compared"]),
    stage(8),
    stage(4),
)


@pytest.fixture
def words(monkeypatch):
    """The first 64-bit words of every stream that is opened for n = 0, 1, ...: {name: (ITEMS, 3) in 0..1}."""
    opened, open_stream = [], np.random.default_rng

    def spy(key):
        rng = open_stream(key)
        before = rng.bit_generator.state
        opened.append(rng.bit_generator.random_raw(3))
        rng.bit_generator.state = before
        return rng

    monkeypatch.setattr(np.random, "default_rng", spy)
    for slow in "make_scene", "some_facts", "choose_facts", "say":  # they only draw from streams that are open
        monkeypatch.setattr(scenes, slow, lambda *args: None)
    for n in range(ITEMS):
        for call, _ in CALLS:
            call(n)
    names = [name for _, few in CALLS for name in few]
    return dict(zip(names, (np.array(opened).reshape(ITEMS, len(names), 3) / 2.0**64).swapaxes(0, 1)))


def test_no_two_purposes_seeds_stages_or_neighbors_are_correlated(words):
    """Six standard deviations of chance, for some 10,000 correlations; equal streams have a correlation of 1."""
    assert np.array_equal(words.pop("scene again"), words["scene"])
    names = [f"{name}, {which}" for which in ("one item", "the next") for name in words for _ in range(3)]
    columns = np.concatenate(list(words.values()), axis=1)  # (ITEMS, streams * 3)
    both = np.concatenate([columns[:-1], columns[1:]], axis=1)
    correlation = np.corrcoef(both, rowvar=False) - np.eye(len(names))
    first, second = np.unravel_index(abs(correlation).argmax(), correlation.shape)
    assert abs(correlation[first, second]) < 6 / ITEMS**0.5, (names[first], names[second])


def test_purposes_are_different_and_never_0():
    purposes = [value for name, value in vars(streams).items() if name.isupper()]
    assert len(set(purposes)) == len(purposes) >= 13 and 0 not in purposes


def test_an_image_depends_on_seed_and_number_alone():
    together = streams.draw_noise(3, [4, 5, 6], (2, 3))
    assert all(np.array_equal(together[i], streams.draw_noise(3, [4 + i], (2, 3))[0]) for i in range(3))
    for seed in -1, 2**32:  # two words to NumPy, which could stand for another key
        with pytest.raises(ValueError, match="--seed must be from 0"):
            streams.stream(streams.NOISE, seed, 0)
