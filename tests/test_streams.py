"""No two purposes share random numbers: neither purposes with each other, nor stages, nor training with sampling."""

import numpy as np
import pytest
from torch.utils.data import Dataset

import data
from support import scenes, streams

ITEMS = 2000
SEED = 7


class Blank(data.Images):
    """A single image that needs no reading. So each number is an epoch, too."""

    def __len__(self):
        return 1

    def read(self, *place):
        return {}


class Endless(Dataset):
    endless = True

    def __getitem__(self, n):
        return {}


def first_words(call, names, monkeypatch):
    """The first 64-bit words of every stream that `call(n)` opens, n = 0, 1, ...: {name: (ITEMS, 3) in 0..1}."""
    opened, open_stream = [], np.random.default_rng

    def spy(key):
        rng = open_stream(key)
        before = rng.bit_generator.state
        opened.append(rng.bit_generator.random_raw(3))
        rng.bit_generator.state = before
        return rng

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", spy)
        for n in range(ITEMS):
            call(n)
    words = np.array(opened).reshape(ITEMS, len(names), 3) / 2.0**64
    return {name: words[:, i] for i, name in enumerate(names)}


def stage(windows):
    """What opens all streams of a stage's sample n."""
    endless = data.Samples(Endless(), SEED, (1,), windows)
    images = data.Samples(Blank(8, augment=True), SEED, (1,), windows)
    names = "time", "noise", "posterior", "uncond", "order", "crop"
    names = [f"{name} of {windows} windows" for name in names]
    return names, lambda n: (endless[n], images.item(n))


@pytest.fixture(scope="module")
def words():
    with pytest.MonkeyPatch.context() as patch:
        for slow in "make_scene", "some_facts", "choose_facts", "say":  # they only draw from streams that are open
            patch.setattr(scenes, slow, lambda *args: None)
        found = {}
        for call, names in (
            (lambda n: scenes.scene_and_caption(SEED, n), ["scene", "caption"]),
            (lambda n: scenes.scene_and_caption(SEED + 1, n), ["scene of another seed", "caption of another seed"]),
            (lambda n: scenes.detailed_caption(SEED, n, 0.4), ["scene again", "detailed caption"]),
            (lambda n: scenes.prompt(SEED, n), ["prompt"]),
            (lambda n: scenes.prompt(SEED, n, 2), ["prompt of two"]),
            (lambda n: streams.draw_noise(SEED, [n], (1,)), ["sampling noise"]),
            (lambda n: streams.stream(streams.READING, SEED, n), ["captions read"]),
            (lambda n: streams.stream(streams.CONTRAST, SEED, n), ["captions compared"]),
            *(stage(windows)[::-1] for windows in (8, 4)),
        ):
            found |= first_words(call, names, patch)
    return found


def test_purposes_are_different_and_never_0():
    purposes = [value for name, value in vars(streams).items() if name.isupper()]
    assert len(set(purposes)) == len(purposes) >= 13 and 0 not in purposes


def test_no_two_purposes_seeds_or_stages_are_correlated(words):
    """Six standard deviations of chance, for 2,500 correlations; equal streams have a correlation of 1."""
    assert np.array_equal(words.pop("scene again"), words["scene"])
    columns = np.concatenate(list(words.values()), axis=1)  # (ITEMS, streams * 3)
    correlation = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
    worst = np.unravel_index(abs(correlation).argmax(), correlation.shape)
    names = [name for name in words for _ in range(3)]
    assert abs(correlation[worst]) < 6 / ITEMS**0.5, [names[i] for i in worst]


def test_neighbors_are_not_correlated(words):
    for name, column in words.items():
        assert abs(np.corrcoef(column[:-1].T, column[1:].T)[:3, 3:]).max() < 6 / ITEMS**0.5, name


def test_what_comes_out_is_not_correlated_either():
    """Noise of training in two stages, of the posterior, and of images with the same seed and number."""
    items = [[data.Samples(Endless(), SEED, (40,), windows)[n] for n in range(200)] for windows in (8, 4)]
    drawn = [np.stack([item[name] for item in few]) for few in items for name in ("noise", "posterior")]
    drawn.append(streams.draw_noise(SEED, range(200), (40,)).numpy())
    correlation = np.corrcoef([part.ravel() for part in drawn]) - np.eye(5)
    assert abs(correlation).max() < 5 / 8000**0.5
    taus = [[item["tau"] for item in few] for few in items]
    assert abs(np.corrcoef(taus)[0, 1]) < 5 / 200**0.5


def test_orders_of_stages_and_epochs_differ():
    class Numbers(Dataset):
        endless = False

        def __len__(self):
            return 3000

        def __getitem__(self, n):
            return {"image": n}

    samples = [data.Samples(Numbers(), SEED, (1,), windows) for windows in (8, 4)]
    orders = [[s.item(n)["image"] for n in range(3000 * e, 3000 * e + 3000)] for s in samples for e in (0, 1)]
    assert abs(np.corrcoef(orders) - np.eye(4)).max() < 5 / 3000**0.5


def test_an_image_depends_on_seed_and_number_alone():
    together = streams.draw_noise(3, [4, 5, 6], (2, 3))
    assert all(np.array_equal(together[i], streams.draw_noise(3, [4 + i], (2, 3))[0]) for i in range(3))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_could_stand_for_another_is_refused(seed):
    with pytest.raises(ValueError, match="--seed must be from 0"):
        streams.stream(streams.NOISE, seed, 0)
