"""The miniature's data set: drawn scenes with captions, and a judge that knows whether an image shows its caption.

A scene is two to four colored shapes on a background. A caption names only part of it, as real captions do, so that
many images fit one caption. Since we know how scenes are drawn, a program can read images back: whether an image
follows its prompt has an exact answer, where real images need a learned score. Read `miniature/train.py` next.
"""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from support.streams import CAPTION, DETAILED_CAPTION, PROMPT, SCENE, stream

TRAIN, VALIDATION, TEST = 0, 1, 2  # seeds: of scenes to train on, to choose settings by, to report on
SIZE = 64  # pixels; pixel j covers [j, j + 1), so its center is j + 0.5
Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5

# Each shape at radius 1, as the distance to its outline, negative inside (y points down). All areas are near pi, so
# that a shape looks as large as a circle of its radius.
SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.886,
    "triangle": lambda x, y: np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.675,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.81) - 0.31,
    "cross": lambda x, y: np.maximum(np.maximum(abs(x), abs(y)) - 1.15, np.minimum(abs(x), abs(y)) - 0.42),
}
REACH = {"circle": 1.0, "square": 1.253, "triangle": 1.35, "ring": 1.12, "cross": 1.225}  # center to farthest point
SIZES = {"small": (6.5, 8), "big": (11, 14)}  # radius in pixels
COLORS = {"red": (225, 45, 45), "green": (40, 185, 60), "blue": (50, 85, 225)}
COLORS |= {"yellow": (240, 210, 50), "purple": (160, 60, 200), "cyan": (50, 205, 220)}
TONES = {"dark": (35, 60), "gray": (110, 145), "light": (195, 225)}  # mean gray level
PATTERNS = ("plain", "gradient", "striped", "checkered")


# draw needs the fields with defaults, parse leaves them out.
@dataclass
class Item:
    shape: str
    color: str
    size: str
    x: float  # center of mass, in pixels
    y: float
    radius: float
    rgb: tuple = ()  # its own shade of the color
    tilt: float = 0.0  # radians


@dataclass
class Scene:
    items: list[Item]
    tone: str | None = None
    pattern: str | None = None
    rgb: tuple = ()  # mean color of the background
    contrast: float = 0.0  # gray levels between that mean and either extreme of the pattern
    angle: float = 0.0  # direction of a gradient or of stripes, radians
    period: float = 0.0  # of stripes and checks, pixels
    phase: tuple = ()


def pick(rng, options):
    return options[int(rng.random() * len(options))]  # rng.choice is ten times slower


def make_scene(rng) -> Scene:
    """Items are inside the image and at least 3 pixels apart. No two share both color and shape, so that "the red
    circle" is never in doubt."""
    tone, pattern = pick(rng, list(TONES)), pick(rng, PATTERNS)
    rgb = rng.uniform(*TONES[tone]) + rng.uniform(-8, 8, 3)
    contrast = rng.uniform(18, 28) if pattern == "gradient" else rng.uniform(10, 16)
    angle, *phase = rng.uniform(0, 2 * np.pi, 3)
    kinds = rng.permutation(len(COLORS) * len(SHAPES))[: 2 + int(rng.random() * 3)]
    items = []
    while len(items) < len(kinds):
        color, shape = divmod(kinds[len(items)], len(SHAPES))
        shape, color, size = list(SHAPES)[shape], list(COLORS)[color], pick(rng, list(SIZES))
        radius, tilt = rng.uniform(*SIZES[size]), rng.uniform(-0.1, 0.1)
        shade = np.array(COLORS[color]) * rng.uniform(0.88, 1.06) + rng.uniform(-12, 12, 3)
        reach = REACH[shape] * radius
        for x, y in rng.uniform(reach + 1, SIZE - reach - 1, (20, 2)).tolist():
            if all(math.dist((x, y), (o.x, o.y)) >= reach + REACH[o.shape] * o.radius + 3 for o in items):
                items.append(Item(shape, color, size, x, y, radius, tuple(shade), tilt))
                break
        else:
            items = []  # no room: begin again, with other sizes
    return Scene(items, tone, pattern, tuple(rgb), contrast, angle, rng.uniform(9, 16), tuple(phase))


def coverage(shape, x, y, radius, tilt=0.0) -> np.ndarray:
    """The share of each pixel that the shape covers, (64, 64): from 1 to 0 within half a pixel of the outline."""
    right, down = (X - x) / radius, (Y - y) / radius
    cos, sin = math.cos(tilt), math.sin(tilt)
    return np.clip(0.5 - radius * SHAPES[shape](cos * right + sin * down, cos * down - sin * right), 0, 1)


AREA = {shape: coverage(shape, 32, 32, 20).sum() / 20**2 for shape in SHAPES}  # at radius 1


def draw(scene: Scene) -> np.ndarray:
    """(64, 64, 3) uint8."""
    cos, sin, turn = math.cos(scene.angle), math.sin(scene.angle), 2 * math.pi / scene.period
    along = cos * (X - SIZE / 2) + sin * (Y - SIZE / 2)
    if scene.pattern == "plain":
        wave = np.zeros_like(X)
    elif scene.pattern == "gradient":
        wave = along / (SIZE / 2 * (abs(cos) + abs(sin)))
    elif scene.pattern == "striped":
        wave = np.clip(3 * np.sin(turn * along + scene.phase[0]), -1, 1)  # steep, not abrupt: no jagged edges
    else:
        wave = np.clip(6 * np.sin(turn * X + scene.phase[0]) * np.sin(turn * Y + scene.phase[1]), -1, 1)
    image = np.float32(scene.rgb) + scene.contrast * wave[..., None]
    for item in scene.items:
        alpha = coverage(item.shape, item.x, item.y, item.radius, item.tilt)[..., None]
        image += alpha * (np.float32(item.rgb) - image)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


# ---- Captions -------------------------------------------------------------------------------------------------------

# Sides of the image in x and in y: -1, 1, or 0 for the middle; None is not stated.
POSITIONS = {"on the left": (-1, None), "on the right": (1, None), "at the top": (None, -1), "at the bottom": (None, 1)}
POSITIONS |= {"at the top left": (-1, -1), "at the top right": (1, -1), "at the bottom left": (-1, 1)}
POSITIONS |= {"at the bottom right": (1, 1), "in the center": (0, 0), "in the middle": (0, 0)}
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("no", "one", "two", "three", "four")


@dataclass
class Named:
    """An item as a caption names it; None is left open, here and below."""

    shape: str
    color: str
    size: str | None = None
    position: str | None = None


@dataclass
class Claims:
    items: list[Named]
    relation: str | None = None  # of the first item to the second
    count: int | None = None  # of all items in the image
    tone: str | None = None
    pattern: str | None = None


def lies(item, position, margin):
    """Is the item on that side of the image, by `margin` image widths? The middle reaches 0.2 from the center."""
    for at, side in zip((item.x, item.y), POSITIONS[position]):
        offset = at / SIZE - 0.5
        if side is not None and margin >= (side * offset if side else 0.2 - abs(offset)):
            return False
    return True


def related(a, b, relation, margin):
    """Is a, say, to the left of b, by more than `margin` pixels?"""
    right, down = RELATIONS[relation]
    return right * (a.x - b.x) + down * (a.y - b.y) > margin


def choose_facts(scene: Scene, rng, named: int, detail: float = 0.4) -> Claims:
    """Name one or two items, with chance `detail` with size, too, and with position; or with their relation. The last
    two are named only where they are plain to see, by margins of 0.12 and 12 pixels; holds() is content with less."""
    items = [scene.items[i] for i in rng.permutation(len(scene.items))[:named]]
    facts = Claims([Named(item.shape, item.color, item.size if rng.random() < detail else None) for item in items])
    if named == 2 and rng.random() < 0.6:
        facts.relation = pick(rng, [r for r in RELATIONS if related(*items, r, 12)] or [None])
    for item, name in zip(items, facts.items):
        if facts.relation is None and rng.random() < detail:
            name.position = pick(rng, [p for p in POSITIONS if lies(item, p, 0.12)] or [None])
    return facts


def falsify(caption: str, scene: Scene, rng) -> str:
    """The caption with a word replaced by another of its kind, or with two exchanged, so that it is false."""
    kinds = [list(SHAPES), list(COLORS), list(SIZES), list(TONES), PATTERNS]
    kinds += [("left", "right"), ("top", "bottom"), ("above", "below")]
    words = re.split(r"(\w+)", caption)
    while True:
        kind = pick(rng, kinds)
        a, b = pick(rng, [word for word in kind if word in words] or kind), pick(rng, kind)
        false = "".join({a: b, b: a}.get(word, word) for word in words)
        if not holds(claims(false), scene):
            return false


def say(facts: Claims, rng) -> str:
    count_first = facts.count is not None and rng.random() < 0.5
    text = pick(rng, ("", "", "", "", "an image of ", "there are " if count_first else "there is "))
    text += f"{NUMBERS[facts.count]} shapes, one of them " if count_first else ""
    phrases = []
    for name in facts.items:
        article = "a" if count_first else pick(rng, ("a", "a", "a", "one"))
        phrases.append(" ".join(filter(None, (article, name.size, name.color, name.shape, name.position))))
    text += (f" {facts.relation} " if facts.relation else pick(rng, (" and ", ", "))).join(phrases)
    if facts.count and not count_first:
        text += f" and {NUMBERS[facts.count - 1]} other shape{'s' * (facts.count > 2)}"
    if facts.tone or facts.pattern:
        text += " ".join(filter(None, (pick(rng, (" on a", ",")), facts.tone, facts.pattern, "background")))
    return text


def one_of(options):
    return f"({'|'.join(options)})"


ITEM = f"(?:a|one) (?:{one_of(SIZES)} )?{one_of(COLORS)} {one_of(SHAPES)}(?: {one_of(POSITIONS)})?"
GRAMMAR = re.compile(
    f"(?:an image of |there is |there are )?(?:{one_of(NUMBERS[2:])} shapes, one of them )?{ITEM}"
    f"(?:(?:,| and| {one_of(RELATIONS)}) {ITEM})?(?: and {one_of(NUMBERS[1:4])} other shapes?)?"
    f"(?:(?: on a|,)(?! background)(?: {one_of(TONES)})?(?: {one_of(PATTERNS)})? background)?"
)


def claims(caption: str) -> Claims:
    """The inverse of say. ValueError for a sentence outside the grammar."""
    match = GRAMMAR.fullmatch(caption)
    if match is None:
        raise ValueError(f"not a caption of the miniature: {caption!r}; try 'a small red circle on the left'")
    total, *first, relation = match.groups()[:6]
    *second, others, tone, pattern = match.groups()[6:]
    items = [Named(shape, color, size, position) for size, color, shape, position in (first, second) if shape]
    count = NUMBERS.index(total) if total else NUMBERS.index(others) + 1 if others else None
    return Claims(items, relation, count, tone, pattern)


# ---- The way back: what does an image show? --------------------------------------------------------------------------

# A color without its gray part. A pixel that an item covers by half is about half as colorful as the item, whatever the
# (nearly gray) background: colorfulness reads as coverage.
CHROMA = np.array([np.subtract(rgb, np.mean(rgb)) for rgb in COLORS.values()], np.float32)
LENGTH = np.linalg.norm(CHROMA, axis=1)


def parse(image: np.ndarray) -> Scene:
    """The items in a (64, 64, 3) uint8 image; backgrounds are not read. Each blob is compared, by intersection over
    union, with every shape of the same center and area. One that is like none of them is "unknown"."""
    image = image.astype(np.float32)
    along = (image - image.mean(2, keepdims=True)) @ (CHROMA / LENGTH[:, None]).T  # (64, 64, colors)
    nearest = along.argmax(2)
    colorful = along.max(2) / LENGTH[nearest] > 0.45
    items = []
    for i, color in enumerate(COLORS):
        parts, n = ndimage.label((nearest == i) & colorful)
        for part in range(1, n + 1):
            mask = parts == part
            if mask.sum() < 16:  # a speck
                continue
            x, y = float(X[mask].mean()), float(Y[mask].mean())
            radii = {shape: math.sqrt(mask.sum() / AREA[shape]) for shape in SHAPES}
            ideals = {shape: coverage(shape, x, y, radius) > 0.5 for shape, radius in radii.items()}
            iou = {shape: (mask & ideal).sum() / (mask | ideal).sum() for shape, ideal in ideals.items()}
            shape = max(iou, key=iou.get)
            size = "small" if radii[shape] < 9.5 else "big"  # halfway between the two ranges of SIZES
            name = shape if iou[shape] > 0.78 else "unknown"
            items.append(Item(name, color, size, x, y, radii[shape]))
    return Scene(items)


def holds(facts: Claims, scene: Scene) -> bool:
    """Is all that was claimed true of the scene? Claims on a background that was not read count as true."""

    def fits(name, item):
        same = (name.shape, name.color, name.size or item.size) == (item.shape, item.color, item.size)
        return same and (name.position is None or lies(item, name.position, 0))

    claimed = (facts.count, len(scene.items)), (facts.tone, scene.tone), (facts.pattern, scene.pattern)
    return all(None in pair or pair[0] == pair[1] for pair in claimed) and any(
        all(map(fits, facts.items, items)) and (facts.relation is None or related(*items, facts.relation, 2))
        for items in itertools.permutations(scene.items, len(facts.items))
    )


def judge(image: np.ndarray, caption: str) -> bool:
    """Does the image show all that the caption says?"""
    return holds(claims(caption), parse(image))


# ---- The data set ---------------------------------------------------------------------------------------------------


def sample(seed: int, index: int) -> tuple[np.ndarray, str]:
    """Image `index` of data set `seed`, (64, 64, 3) uint8, with its caption."""
    return draw(make_scene(stream(SCENE, seed, index))), caption(seed, index)


def caption(seed: int, index: int, detail: float | None = None) -> str:
    """The caption of scene `index`; with `detail` (see `choose_facts`), another one."""
    scene = make_scene(stream(SCENE, seed, index))
    rng = stream(CAPTION if detail is None else DETAILED_CAPTION, seed, index)
    return say(some_facts(scene, rng, detail or 0.4), rng)


def some_facts(scene: Scene, rng, detail: float = 0.4) -> Claims:
    """What a caption says of a scene: one or two items, sometimes how many there are, or the background."""
    kind, background = rng.random(), rng.random()
    facts = choose_facts(scene, rng, 2 if kind < 0.5 else 1, detail)
    facts.count = len(scene.items) if kind > 0.9 else None
    facts.tone = scene.tone if background < 0.12 else None
    facts.pattern = scene.pattern if 0.06 < background < 0.18 else None
    return facts


def prompt(seed: int, index: int, named: int = 1) -> str:
    """A caption that names one or two items and nothing else, for evaluation. Its scene is in no data set."""
    rng = stream(PROMPT, seed, index, named)
    return say(choose_facts(make_scene(rng), rng, named), rng)
