"""The miniature's data set: drawn scenes with captions, and a judge that can tell whether an image keeps to a caption.

A scene is two to four colored shapes on a background. Its caption names only part of what is there, so that many
images fit one caption, as with real captions. And since we know how scenes are drawn we can read images back: "does
it follow the prompt?" has an exact answer, where real images need a learned score.
    forward   make_scene -> draw: an image      choose_facts -> say: a caption
    backward  parse: what the image shows      claims: what the caption says      judge: do they agree?
Read next: miniature.py, which trains a whole Stable Diffusion on these.
"""

import itertools
import math
import re
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from support import streams
from support.streams import stream

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


# ---------------------------------------------------------------- scenes, and how they are drawn


# A field with a default is paint: draw needs it, parse leaves it out.
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
    tone: str
    pattern: str
    rgb: tuple = ()  # mean color of the background
    contrast: float = 0.0  # gray levels between that mean and either extreme of the pattern
    angle: float = 0.0  # direction of a gradient or of stripes, radians
    period: float = 0.0  # of stripes and checks, pixels
    phase: tuple = ()


def pick(rng, options):
    return options[int(rng.random() * len(options))]  # rng.choice is ten times slower


def make_scene(rng) -> Scene:
    tone, pattern = pick(rng, list(TONES)), pick(rng, PATTERNS)
    rgb = rng.uniform(*TONES[tone]) + rng.uniform(-8, 8, 3)
    contrast = rng.uniform(18, 28) if pattern == "gradient" else rng.uniform(10, 16)
    angle, *phase = rng.uniform(0, 2 * np.pi, 3)
    # No two items share both color and shape, so that "the red circle" is never in doubt.
    kinds = rng.permutation(len(COLORS) * len(SHAPES))[: 2 + int(rng.random() * 3)]
    items = [None]
    while None in items:  # one found no room: begin again, with other sizes
        items = []
        for kind in kinds:
            items.append(place(rng, list(SHAPES)[kind % len(SHAPES)], list(COLORS)[kind // len(SHAPES)], items))
            if items[-1] is None:
                break
    return Scene(items, tone, pattern, tuple(rgb), contrast, angle, rng.uniform(9, 16), tuple(phase))


def place(rng, shape, color, others) -> Item | None:
    """An item inside the image and at least 3 pixels from the others; None if a few tries find no room."""
    size = pick(rng, list(SIZES))
    radius, tilt = rng.uniform(*SIZES[size]), rng.uniform(-0.1, 0.1)
    rgb = np.array(COLORS[color]) * rng.uniform(0.88, 1.06) + rng.uniform(-12, 12, 3)
    reach = REACH[shape] * radius
    for x, y in rng.uniform(reach + 1, SIZE - reach - 1, (20, 2)).tolist():
        if all(math.dist((x, y), (o.x, o.y)) >= reach + REACH[o.shape] * o.radius + 3 for o in others):
            return Item(shape, color, size, x, y, radius, tuple(rgb), tilt)
    return None


def coverage(shape, x, y, radius, tilt=0.0, window=...):
    """How much of each pixel in `window` the shape covers: from 1 to 0 within half a pixel of the outline."""
    right, down = (X[window] - x) / radius, (Y[window] - y) / radius
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
        reach = REACH[item.shape] * item.radius + 1
        window = tuple(slice(int(at - reach), int(at + reach) + 1) for at in (item.y, item.x))
        alpha = coverage(item.shape, item.x, item.y, item.radius, item.tilt, window)[..., None]
        image[window] += alpha * (np.float32(item.rgb) - image[window])
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- captions: said of a scene, and understood

# Sides of the image in x and in y: -1, 1, or 0 for the middle; None is not told.
POSITIONS = {"on the left": (-1, None), "on the right": (1, None), "at the top": (None, -1), "at the bottom": (None, 1)}
POSITIONS |= {"at the top left": (-1, -1), "at the top right": (1, -1), "at the bottom left": (-1, 1)}
POSITIONS |= {"at the bottom right": (1, 1), "in the center": (0, 0), "in the middle": (0, 0)}
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("no", "one", "two", "three", "four")
# What a caption can be wrong about: fields of Named and of Claims, and their other values.
LOOKS = {"shape": list(SHAPES), "color": list(COLORS), "size": list(SIZES), "position": list(POSITIONS)}
FACTS = {"relation": list(RELATIONS), "count": [2, 3, 4], "tone": list(TONES), "pattern": PATTERNS}


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


def falsify(facts: Claims, scene: Scene, rng) -> Claims:
    """The same claims but for one, so that they are false: a caption to be told from the true one."""

    def other(options, told):
        return pick(rng, [option for option in options if option != told])

    names = facts.items
    changes = [(facts, field, options) for field, options in FACTS.items() if getattr(facts, field)]
    changes += [(name, field, options) for name in names for field, options in LOOKS.items() if getattr(name, field)]
    if len(names) == 2:
        changes += [(names, "shape", None), (names, "color", None)]
    while True:
        what, field, options = pick(rng, changes)
        if what is names:  # each has what the other should have
            a, b = (getattr(name, field) for name in names)
            changed = [replace(names[0], **{field: b}), replace(names[1], **{field: a})]
        else:
            new = replace(what, **{field: other(options, getattr(what, field))})
            changed = [new if name is what else name for name in names]
        false = replace(new if what is facts else facts, items=changed)
        if not holds(false, scene):
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
CAPTION = re.compile(
    f"(?:an image of |there is |there are )?(?:{one_of(NUMBERS[2:])} shapes, one of them )?{ITEM}"
    f"(?:(?:,| and| {one_of(RELATIONS)}) {ITEM})?(?: and {one_of(NUMBERS[1:4])} other shapes?)?"
    f"(?:(?: on a|,)(?! background)(?: {one_of(TONES)})?(?: {one_of(PATTERNS)})? background)?"
)


def claims(caption: str) -> Claims:
    """The inverse of say. ValueError for a sentence outside the grammar."""
    match = CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(f"not a caption of the miniature: {caption!r}; try 'a small red circle on the left'")
    total, *first, relation = match.groups()[:6]
    *second, others, tone, pattern = match.groups()[6:]
    items = [Named(shape, color, size, position) for size, color, shape, position in (first, second) if shape]
    count = NUMBERS.index(total) if total else NUMBERS.index(others) + 1 if others else None
    return Claims(items, relation, count, tone, pattern)


def words() -> list[str]:
    """Every word of the captions, for the tokenizer; besides these there is only the comma."""
    glue = "an image of there is are shapes one them and other shape on background two three four"
    phrases = (glue, *SIZES, *COLORS, *SHAPES, *POSITIONS, *RELATIONS, *TONES, *PATTERNS)
    return sorted(set(" ".join(phrases).split()))


# ---------------------------------------------------------------- the way back: what does an image show?

# A color without its gray part. A pixel that an item covers by half is about half as colorful as the item, whatever the
# (nearly gray) background: colorfulness reads as coverage.
CHROMA = np.array([np.subtract(rgb, np.mean(rgb)) for rgb in COLORS.values()], np.float32)
LENGTH = np.linalg.norm(CHROMA, axis=1)


def parse(image: np.ndarray) -> Scene:
    """The items and the background of a (64, 64, 3) uint8 image. A blob like none of our shapes is "unknown"."""
    image = image.astype(np.float32)
    along = (image - image.mean(2, keepdims=True)) @ (CHROMA / LENGTH[:, None]).T  # (64, 64, colors)
    nearest = along.argmax(2)
    strength = along.max(2) / LENGTH[nearest]
    items = []
    for i, color in enumerate(COLORS):
        parts, n = ndimage.label((nearest == i) & (strength > 0.45))
        masks = [parts == part for part in range(1, n + 1)]
        items += [identify(mask, color) for mask in masks if mask.sum() >= 16]  # less is a speck
    free = ~ndimage.binary_dilation(strength > 0.3, iterations=2)
    return Scene(items, *background(image.mean(2), free))


def identify(mask, color) -> Item:
    """Compare a blob with each shape of the same center and area, by intersection over union."""
    x, y, area = float(X[mask].mean()), float(Y[mask].mean()), mask.sum()
    ideals = {shape: coverage(shape, x, y, math.sqrt(area / AREA[shape])) > 0.5 for shape in SHAPES}
    iou = {shape: (mask & ideal).sum() / (mask | ideal).sum() for shape, ideal in ideals.items()}
    shape = max(iou, key=iou.get)
    radius = math.sqrt(area / AREA[shape])
    size = "small" if radius < 9.5 else "big"  # halfway between the two ranges of SIZES
    return Item(shape if iou[shape] > 0.78 else "unknown", color, size, x, y, radius)


def background(gray, free):
    """Tone and pattern, from the gray levels (64, 64) of the pixels free of items."""
    if free.sum() < SIZE:
        return "unknown", "unknown"
    mean = gray[free].mean()
    tone = "dark" if mean < 85 else "gray" if mean < 170 else "light"
    wave = np.where(free, ndimage.uniform_filter(gray, 3) - mean, 0)
    if wave[free].std() < 4:
        return tone, "plain"
    # The strongest wave has (fy, fx) periods per image. A gradient is less than two. Checks, sin x sin y, come with a
    # mirror image (-fy, fx); stripes are alone.
    power = abs(np.fft.rfft2(wave)) ** 2
    fy, fx = np.unravel_index(power.argmax(), power.shape)
    if math.hypot(fx, min(fy, SIZE - fy)) < 2.5:
        return tone, "gradient"
    checks = min(fx, fy, SIZE - fy) >= 3 and power[-fy, fx] > 0.25 * power[fy, fx]
    return tone, "checkered" if checks else "striped"


def holds(facts: Claims, scene: Scene) -> bool:
    """Is all that was claimed true of the scene?"""

    def fits(name, item):
        same = (name.shape, name.color, name.size or item.size) == (item.shape, item.color, item.size)
        return same and (name.position is None or lies(item, name.position, 0))

    return (
        facts.count in (None, len(scene.items))
        and facts.tone in (None, scene.tone)
        and facts.pattern in (None, scene.pattern)
        and any(
            all(map(fits, facts.items, items)) and (facts.relation is None or related(*items, facts.relation, 2))
            for items in itertools.permutations(scene.items, len(facts.items))
        )
    )


def judge(image: np.ndarray, caption: str) -> bool:
    """Does the image show all that the caption says?"""
    return holds(claims(caption), parse(image))


# ---------------------------------------------------------------- the data set


def sample(seed: int, index: int) -> tuple[np.ndarray, str]:
    """Image `index` of data set `seed`, (64, 64, 3) uint8, with its caption."""
    scene, caption = scene_and_caption(seed, index)
    return draw(scene), caption


def scene_and_caption(seed: int, index: int) -> tuple[Scene, str]:
    """Scene `index` of data set `seed`, not drawn, and its caption."""
    scene, rng = make_scene(stream(streams.SCENE, seed, index)), stream(streams.CAPTION, seed, index)
    return scene, say(some_facts(scene, rng), rng)


def detailed_caption(seed: int, index: int, detail: float) -> str:
    """Another caption of scene `index`, that tells more; `detail` as in `choose_facts`."""
    scene, rng = make_scene(stream(streams.SCENE, seed, index)), stream(streams.DETAILED_CAPTION, seed, index)
    return say(some_facts(scene, rng, detail), rng)


def some_facts(scene: Scene, rng, detail: float = 0.4) -> Claims:
    """What a caption tells of a scene: one or two items, sometimes how many there are, or the background."""
    kind, told = rng.random(), rng.random()
    facts = choose_facts(scene, rng, 2 if kind < 0.5 else 1, detail)
    facts.count = len(scene.items) if kind > 0.9 else None
    facts.tone = scene.tone if told < 0.12 else None
    facts.pattern = scene.pattern if 0.06 < told < 0.18 else None
    return facts


def captions(scene: Scene, rng, wrong: int) -> list[str]:
    """A true caption, and `wrong` false ones that differ from it in one thing and not in their phrasing."""
    facts, phrasing = some_facts(scene, rng), rng.integers(2**32)
    told = [facts] + [falsify(facts, scene, rng) for _ in range(wrong)]
    return [say(facts, np.random.default_rng(phrasing)) for facts in told]


def prompt(seed: int, index: int, named: int = 1) -> str:
    """A caption that names one or two items and no more, for evaluation. Take a seed that no training image used."""
    rng = stream(streams.PROMPT, seed, index, named)
    return say(choose_facts(make_scene(rng), rng, named), rng)
