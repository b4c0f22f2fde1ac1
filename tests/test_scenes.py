"""Drawn scenes: captions are parsed back exactly, images almost always, and the judge is neither blind nor lenient."""

import re
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from support import scenes
from support.scenes import COLORS, SHAPES, SIZES, X, Y, claims, coverage, draw, holds, judge, parse, say
from support.streams import SCENE, stream


def scene_of(seed, index):
    return scenes.make_scene(stream(SCENE, seed, index))  # the scene that sample(seed, index) draws


def degrade(image, rng):
    """What a small autoencoder does: it blurs, adds noise and shifts colors a little."""
    image = ndimage.gaussian_filter(image.astype(float), (0.8, 0.8, 0))
    image += rng.normal(0, 6, image.shape) + rng.uniform(-4, 4, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_reaches_as_far_as_said_around_its_center_of_mass_and_is_about_as_large_as_the_others(shape):
    alpha = coverage(shape, 32.0, 32.0, 20.0)
    assert np.isclose(np.hypot(X - 32, Y - 32)[alpha > 0.01].max(), 20 * scenes.REACH[shape], atol=1)
    assert np.allclose(((alpha * X).sum() / alpha.sum(), (alpha * Y).sum() / alpha.sum()), 32, atol=0.05)
    assert 0.7 * max(scenes.AREA.values()) < scenes.AREA[shape]


def test_items_are_apart_inside_and_differ_in_color_or_shape():
    for index in range(80):
        scene = scene_of(0, index)
        alphas = [coverage(i.shape, i.x, i.y, i.radius, i.tilt) > 0 for i in scene.items]
        assert 2 <= len(alphas) <= 4
        assert len({(i.shape, i.color) for i in scene.items}) == len(alphas)
        grown = sum(ndimage.binary_dilation(alpha).astype(int) for alpha in alphas)
        assert grown.max() == 1  # one more pixel around each and still no overlap
        assert not any(np.pad(alpha[1:-1, 1:-1], 1).sum() < alpha.sum() for alpha in alphas)  # none at the edge
        assert all(SIZES[i.size][0] <= i.radius <= SIZES[i.size][1] for i in scene.items)


def test_a_caption_says_its_facts_and_no_others():
    for index in range(300):
        rng = np.random.default_rng(index)
        facts = scenes.some_facts(scenes.make_scene(rng), rng)
        assert claims(say(facts, rng)) == facts


def test_captions_say_part_of_what_the_image_shows():
    said = [claims(scenes.caption(3, index)) for index in range(500)]
    assert np.mean([len(c.items) == 2 for c in said]) == pytest.approx(0.50, abs=0.07)
    assert np.mean([c.count is not None for c in said]) == pytest.approx(0.10, abs=0.05)
    assert np.mean([c.tone is not None or c.pattern is not None for c in said]) == pytest.approx(0.18, abs=0.05)
    assert {n.position for c in said for n in c.items} == {None, *scenes.POSITIONS}
    assert {c.relation for c in said} == {None, *scenes.RELATIONS}


def test_a_caption_is_true_and_a_detailed_one_of_the_same_scene_says_more():
    details = {None: 0, 0.8: 0}
    for index in range(120):
        for detail in details:
            facts = claims(scenes.caption(0, index, detail))
            assert holds(facts, scene_of(0, index))
            details[detail] += sum(bool(item.size) + bool(item.position) for item in facts.items)
    assert details[0.8] > 1.4 * details[None] > 40


def test_a_false_caption_is_a_caption_that_is_false_by_one_word_or_two_exchanged():
    changed = Counter()
    for index in range(200):
        true = scenes.caption(4, index)
        false = scenes.falsify(true, scene_of(4, index), np.random.default_rng(index))
        assert not holds(claims(false), scene_of(4, index)), (true, false)
        pairs = {(a, b) for a, b in zip(re.findall(r"\w+", true), re.findall(r"\w+", false), strict=True) if a != b}
        assert len(pairs) == 1 or len(pairs) == 2 and len({frozenset(pair) for pair in pairs}) == 1
        changed[len(pairs)] += 1
    assert changed[2] > 10  # which attribute belongs to which item, too


@pytest.mark.parametrize("named", (1, 2))
def test_a_prompt_names_that_many_items_and_nothing_but_items(named):
    for index in range(200):
        said = claims(scenes.prompt(5, index, named))
        assert len(said.items) == named and (said.count, said.tone, said.pattern) == (None, None, None)


def test_a_sentence_outside_the_grammar_is_refused():
    for caption in "", "a red circle on", "red circle", "a pink circle", "a red circle on a background":
        with pytest.raises(ValueError, match="not a caption"):
            claims(caption)


@pytest.mark.parametrize("damage, wanted", ((False, 0.99), (True, 0.96)), ids=("fresh", "blur and noise"))
def test_all_items_of_an_image_are_found_with_shape_color_size_and_place_and_nothing_else(damage, wanted):
    right = []
    for index in range(100):
        scene, image = scene_of(6, index), draw(scene_of(6, index))
        found = parse(degrade(image, np.random.default_rng(index)) if damage else image).items
        twins = [(a, b) for a in scene.items for b in found if (a.shape, a.color, a.size) == (b.shape, b.color, b.size)]
        near = [np.hypot(a.x - b.x, a.y - b.y) < 2 for a, b in twins]
        right.append(len(scene.items) == len(found) == sum(near) == len(near))
    assert np.mean(right) >= wanted


DISC = np.hypot(X - 32, Y - 32) < 12
BLOBS = {
    "ellipse": (((X - 32) / 16) ** 2 + ((Y - 32) / 8) ** 2 < 1, "unknown"),
    "crescent": (DISC & (np.hypot(X - 38, Y - 32) > 10), "unknown"),
    "two discs that touch": ((np.hypot(X - 24, Y - 32) < 9) | (np.hypot(X - 40, Y - 32) < 9), "unknown"),
    "thin ring": (DISC & (np.hypot(X - 32, Y - 32) > 10.5), "unknown"),
    "disc": (DISC, "circle"),
    "disc with a hole": (DISC & (np.hypot(X - 32, Y - 32) > 6), "ring"),
    "disc and a speck": (DISC | (np.hypot(X - 8, Y - 8) < 1.5), "circle"),
}


@pytest.mark.parametrize("name", BLOBS)
def test_a_blob_is_the_shape_that_it_is_like_or_unknown(name):
    mask, shape = BLOBS[name]
    image = np.where(mask[..., None], COLORS["red"], (130, 130, 130)).astype(np.uint8)
    assert [(item.shape, item.color) for item in parse(image).items] == [(shape, "red")]


def test_any_image_can_be_read():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    for image in (np.zeros((64, 64, 3)), np.full((64, 64, 3), COLORS["red"]), noise):
        assert not judge(image.astype(np.uint8), "a blue ring")


CIRCLE = scenes.Item("circle", "red", "big", 16, 16, 12, COLORS["red"])
RING = scenes.Item("ring", "blue", "small", 48, 40, 7, COLORS["blue"])
JUDGED = {
    "a big red circle to the left of a small blue ring": True,
    "a red circle at the top left and a blue ring on the right": True,
    "two shapes, one of them a blue ring": True,
    "a red circle and one other shape on a striped background": True,
    "a red circle on a dark background": True,  # backgrounds are not judged
    "a red circle to the right of a blue ring": False,
    "a red circle at the bottom left": False,
    "a red circle in the center": False,
    "a small red circle": False,
    "a red circle and two other shapes": False,
    "a red ring": False,
}


@pytest.mark.parametrize("caption", JUDGED)
def test_items_count_relation_and_position_are_judged(caption):
    image = draw(scenes.Scene([CIRCLE, RING], "light", "striped", (210, 210, 210), 12, 0.5, 10, (0, 0)))
    assert judge(image, caption) == JUDGED[caption]
