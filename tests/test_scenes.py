"""scenes.py: captions are parsed back exactly, images almost always, and the judge is neither blind nor lenient."""

import re
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from support import scenes
from support.scenes import choose_facts, claims, coverage, draw, holds, judge, make_scene, parse, prompt, sample, say

COLORS, SHAPES, SIZES, X, Y = scenes.COLORS, scenes.SHAPES, scenes.SIZES, scenes.X, scenes.Y


def scene_of(seed, index):
    return make_scene(np.random.default_rng((seed, index)))  # the scene that sample(seed, index) draws


def degrade(image, rng, blur=0.8, noise=6):
    """What a small autoencoder does: it blurs, adds noise and shifts colors a little."""
    image = ndimage.gaussian_filter(image.astype(float), (blur, blur, 0))
    image += rng.normal(0, noise, image.shape) + rng.uniform(-4, 4, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def items_agree(scene, image):
    """Every item found once with shape, color, size and its place to 2 pixels, and nothing else found."""
    for item in scene.items:
        twins = [p for p in image.items if (p.shape, p.color, p.size) == (item.shape, item.color, item.size)]
        if len(twins) != 1 or np.hypot(twins[0].x - item.x, twins[0].y - item.y) > 2:
            return False
    return len(image.items) == len(scene.items)


# ---------------------------------------------------------------- scenes


def test_a_sample_depends_on_seed_and_index_alone():
    image, caption = sample(3, 14)
    again, same = sample(3, 14)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert caption == same and (image == again).all()
    assert (image != sample(3, 15)[0]).any() and (image != sample(4, 14)[0]).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_reach_is_the_farthest_point_and_the_center_is_the_center_of_mass(shape):
    alpha = coverage(shape, 32.0, 32.0, 20.0)
    assert np.isclose(np.hypot(X - 32, Y - 32)[alpha > 0.01].max(), 20 * scenes.REACH[shape], atol=1)
    assert np.isclose((alpha * X).sum() / alpha.sum(), 32, atol=0.05)
    assert np.isclose((alpha * Y).sum() / alpha.sum(), 32, atol=0.05)


def test_shapes_of_one_radius_have_comparable_areas():
    assert 0.7 < min(scenes.AREA.values()) / max(scenes.AREA.values())


def test_items_are_apart_inside_and_told_apart_by_color_and_shape():
    for index in range(500):
        scene = scene_of(0, index)
        alphas = [coverage(i.shape, i.x, i.y, i.radius, i.tilt) > 0 for i in scene.items]
        assert 2 <= len(alphas) <= 4
        assert len({(i.shape, i.color) for i in scene.items}) == len(alphas)
        grown = sum(ndimage.binary_dilation(alpha).astype(int) for alpha in alphas)
        assert grown.max() == 1  # one more pixel around each and still no overlap
        edge = np.ones((64, 64), bool)
        edge[1:-1, 1:-1] = False
        assert not any((alpha & edge).any() for alpha in alphas)
        for item in scene.items:
            low, high = SIZES[item.size]
            assert low <= item.radius <= high


# ---------------------------------------------------------------- captions


def test_a_caption_says_its_facts_and_no_others():
    for index in range(4000):
        rng = np.random.default_rng((1, index))
        scene = make_scene(rng)
        facts = choose_facts(scene, rng, 1 + index % 2)
        facts.count = len(scene.items) if index % 2 == 0 and index % 3 == 0 else None
        facts.tone = scene.tone if index % 5 < 2 else None
        facts.pattern = scene.pattern if index % 7 < 3 else None
        assert claims(say(facts, rng)) == facts


def test_a_caption_is_true_of_its_scene():
    assert all(holds(claims(sample(2, index)[1]), scene_of(2, index)) for index in range(2000))


def test_captions_name_only_part_of_the_image():
    told = [claims(sample(3, index)[1]) for index in range(4000)]
    share = {
        "one": np.mean([len(c.items) == 1 and c.count is None for c in told]),
        "two": np.mean([len(c.items) == 2 for c in told]),
        "count": np.mean([c.count is not None for c in told]),
        "background": np.mean([c.tone is not None or c.pattern is not None for c in told]),
    }
    assert share == pytest.approx({"one": 0.40, "two": 0.50, "count": 0.10, "background": 0.18}, abs=0.03)
    assert {n.position for c in told for n in c.items} == {None, *scenes.POSITIONS}
    assert {c.relation for c in told} == {None, *scenes.RELATIONS}


def test_a_false_caption_is_false_in_one_thing():
    changed = Counter()
    for index in range(300):
        scene = scene_of(4, index)
        true, *false = scenes.captions(scene, np.random.default_rng(index), wrong=4)
        assert len(false) == 4 and holds(claims(true), scene)
        for caption in false:
            assert not holds(claims(caption), scene), (true, caption)
            words = [(a, b) for a, b in zip(facts_of(true), facts_of(caption), strict=True) if a != b]
            assert len(words) == 1 or len(words) == 2 and words[0] == words[1][::-1]  # or two items changed places
            changed[len(words)] += 1
    assert changed[2] > 100  # of which attribute is whose, too


def facts_of(caption):
    told = claims(caption)
    named = [part for item in told.items for part in (item.shape, item.color, item.size, item.position)]
    return [*named, told.relation, told.count, told.tone, told.pattern]


def test_words_lists_exactly_the_words_of_captions():
    captions = " ".join(sample(4, index)[1] for index in range(4000))
    assert captions.isascii() and captions == captions.lower()
    assert sorted(set(captions.replace(",", "").split())) == scenes.words()


@pytest.mark.parametrize("named", (1, 2))
def test_a_prompt_names_that_many_items_and_nothing_but_items(named):
    for index in range(500):
        told = claims(prompt(5, index, named))
        assert len(told.items) == named and (told.count, told.tone, told.pattern) == (None, None, None)


def test_a_sentence_outside_the_grammar_is_refused():
    for caption in ("", "a cat", "a red circle on", "red circle", "a pink circle", "a red circle on a background"):
        with pytest.raises(ValueError, match="not a caption"):
            claims(caption)


# ---------------------------------------------------------------- reading images


@pytest.mark.parametrize("damage, wanted", ((False, 0.99), (True, 0.97)), ids=("fresh", "blur and noise"))
def test_images_are_read_wholly_right(damage, wanted):
    right, tone, pattern = [], [], []
    for index in range(1500):
        scene = scene_of(6, index)
        image = draw(scene)
        image = parse(degrade(image, np.random.default_rng(index)) if damage else image)
        right.append(items_agree(scene, image))
        tone.append(image.tone == scene.tone)
        pattern.append(image.pattern == scene.pattern)
    assert np.mean(np.array(right) & tone) >= wanted and np.mean(pattern) >= wanted


def paint(mask):
    """A red blob on gray."""
    return np.where(mask[..., None], COLORS["red"], (130, 130, 130)).astype(np.uint8)


@pytest.mark.parametrize(
    "blob",
    (
        ((X - 32) / 16) ** 2 + ((Y - 32) / 8) ** 2 < 1,
        (abs(X - 32) < 4) & (abs(Y - 32) < 16),
        (np.hypot(X - 32, Y - 32) < 12) & (np.hypot(X - 38, Y - 32) > 10),
        (np.hypot(X - 24, Y - 32) < 9) | (np.hypot(X - 40, Y - 32) < 9),
        (np.hypot(X - 32, Y - 32) < 12) & (np.hypot(X - 32, Y - 32) > 10.5),
        (abs(X - 32) < 12) & (abs(Y - 32) < 12) & ((X < 28) | (Y > 36)),
    ),
    ids=("ellipse", "bar", "crescent", "two discs that touch", "thin ring", "letter L"),
)
def test_a_blob_like_none_of_the_shapes_is_unknown(blob):
    assert [(item.shape, item.color) for item in parse(paint(blob)).items] == [("unknown", "red")]


def test_a_ring_without_its_hole_is_a_circle_and_specks_are_nothing():
    disc = np.hypot(X - 32, Y - 32) < 12
    assert [item.shape for item in parse(paint(disc)).items] == ["circle"]
    assert [item.shape for item in parse(paint(disc & (np.hypot(X - 32, Y - 32) > 6))).items] == ["ring"]
    assert [item.shape for item in parse(paint(disc | (np.hypot(X - 8, Y - 8) < 1.5))).items] == ["circle"]


def test_any_image_can_be_read():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    for image in (np.zeros((64, 64, 3)), np.full((64, 64, 3), COLORS["red"]), noise):
        assert not judge(image.astype(np.uint8), "a blue ring")


# ---------------------------------------------------------------- the judge


@pytest.mark.parametrize("damage", (False, True), ids=("fresh", "blur and noise"))
def test_a_scene_keeps_to_its_own_caption_and_seldom_to_another(damage):
    own, other, last = [], [], "a red circle"
    for index in range(1000):
        image, caption = sample(7, index)
        image = parse(degrade(image, np.random.default_rng(index)) if damage else image)
        own.append(holds(claims(caption), image))
        other.append(holds(claims(last), image))
        last = caption
    assert np.mean(own) >= 0.99 and np.mean(other) < 0.06


# Another color or shape may by chance name another item of the scene; the other words cannot be right twice.
CHANCE = {tuple(COLORS): 0.12, tuple(SHAPES): 0.12, tuple(SIZES): 0, ("left", "right"): 0, ("above", "below"): 0}


@pytest.mark.parametrize("options", CHANCE, ids=" ".join)
def test_one_changed_word_makes_a_caption_wrong(options):
    fooled = []
    for index in range(1000):
        image, caption = sample(8, index)
        absent = [word for word in options if word not in caption.split()]
        if 0 < len(absent) < len(options):
            present = next(word for word in options if word not in absent)
            changed = re.sub(rf"\b{present}\b", absent[index % len(absent)], caption)
            fooled.append(judge(image, changed))
    assert len(fooled) >= 40 and np.mean(fooled) <= CHANCE[options]


def test_count_relation_and_position_are_judged():
    circle = scenes.Item("circle", "red", "big", 16, 16, 12, COLORS["red"])
    ring = scenes.Item("ring", "blue", "small", 48, 40, 7, COLORS["blue"])
    image = draw(scenes.Scene([circle, ring], "light", "striped", (210, 210, 210), 12, 0.5, 10, (0, 0)))
    for true in (
        "a big red circle to the left of a small blue ring",
        "one blue ring below one red circle",
        "a red circle at the top left and a blue ring on the right, light striped background",
        "two shapes, one of them a blue ring",
        "a red circle and one other shape on a striped background",
    ):
        assert judge(image, true), true
    for false in (
        "a red circle to the right of a blue ring",
        "a red circle below a blue ring",
        "a red circle at the bottom left",
        "a red circle in the center",
        "three shapes, one of them a blue ring",
        "a red circle and two other shapes",
        "a red ring",
        "a red circle on a dark background",
        "a red circle on a plain background",
    ):
        assert not judge(image, false), false
