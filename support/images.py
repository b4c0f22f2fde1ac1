"""Images on disk: finding and reading them, PNG files that hold their settings, many images on one."""

import os
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from support.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LONGEST = 32  # times its shorter side: resizing the shorter side of a 1 x 4000 image would take gigabytes
ORIENTATION, TURN = 0x0112, Image.Transpose  # EXIF: how the camera was held; and what turns the image upright
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
TURNS |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}


def find_images(folder: Path) -> list[Path]:
    """All images in a folder and the folders in it, in natural order: 2.png before 10.png.

    Hidden files and folders are left out, what macOS and a NAS add, and sample.py's sheet.png. Links to folders are
    followed, each folder once. Raises InputError where there is no folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; check the path")
    files, links, seen = [], [folder], set()
    for link in links:  # grows while it runs
        for place, folders, names in os.walk(link):
            folders[:] = [name for name in folders if not is_hidden(name)]
            if os.path.realpath(place) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            links += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
            files += [Path(place, name) for name in names if is_image(name) and name != "sheet.png"]
    if not files:
        raise InputError(f"{folder} holds no images ({', '.join(SUFFIXES)}); check the path")
    return sorted(files, key=natural)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


def natural(file: Path) -> tuple[list, Path]:
    """What sorts names with the numbers in them by value."""
    parts = [re.split("([0-9]+)", part) for part in file.parts]  # each is text, number, text, number, ..., text
    return [[int(x) if i % 2 else x for i, x in enumerate(part)] for part in parts], file


def read_image(file, upright: bool = False, on_white: bool = False) -> Image.Image:
    """An image file, or its content as a stream, of any mode as RGB. Everybody reads images by this function.

    `upright`: turn it as its EXIF says. `on_white`: what is transparent shows white; else transparency is dropped.
    Raises ValueError where it is damaged, too large or too long.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:  # of tags that nobody needs
            width, height = image.size
            if width * height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            if max(image.size) > LONGEST * min(image.size):
                raise ValueError(f"{width} x {height} pixels: one side is over {LONGEST} times the other")
            image.load()
            turn = orientation(image) if upright else None
            image = to_rgb(image, on_white)
            return image if turn is None else image.transpose(turn)
    except Exception as error:  # pillow has many ways to say that a file is damaged
        raise ValueError(f"cannot be read: {error or type(error).__name__}") from None


def orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # a broken EXIF; the image itself may be fine
        return None


def to_rgb(image: Image.Image, on_white: bool = False) -> Image.Image:
    """An image of any mode as RGB. 16 bits of grey keep their upper 8, as pillow does with 16 bits of color."""
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its levels of grey are not 16 bits")
        transparent = image.info.get("transparency")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(levels != transparent).convert("L"))
    if image.mode == "F":
        raise ValueError("its levels are floating-point numbers of unknown range")
    if on_white and image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def settings_of_png(file: Path) -> dict[str, str]:
    """What sample.py wrote into one of its images, read without the pixels. Empty for any other file."""
    try:
        with Image.open(file) as image:
            settings = {name: str(value) for name, value in image.info.items() if isinstance(value, str)}
    except Exception:  # pillow has many ways to say that a file is damaged
        return {}
    return settings if settings.get("software") == "proreflow" or {"index", "weights"} <= settings.keys() else {}


def save_png(image: np.ndarray, file: Path, settings: dict[str, str]) -> None:
    """Write an image (H, W, 3) with its settings in its text chunk, whole or not at all."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_itxt(name, value)
    write_png(Image.fromarray(image), file, info)


def write_png(image: Image.Image, file: Path, info: PngInfo | None = None) -> None:
    """Write a PNG file, whole or not at all."""
    image.save(file.with_suffix(".partial"), format="PNG", pnginfo=info)
    os.replace(file.with_suffix(".partial"), file)


def image_grid(images: list[np.ndarray], captions: list[str], columns: int) -> Image.Image:
    """All images on one, each over its caption; small ones enlarged."""
    height, width = images[0].shape[:2]
    zoom = max(1, 128 // width)
    cell, text = (width * zoom + 8, height * zoom + 8), 30
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + 8, rows * (cell[1] + text) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = 8 + i % columns * cell[0], 8 + i // columns * (cell[1] + text)
        sheet.paste(Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST), (x, y))
        lines = wrap(caption, lambda line: pen.textlength(line) <= width * zoom)
        pen.multiline_text((x, y + height * zoom + 2), "\n".join(lines[:2]), "black", spacing=1)
    return sheet


def wrap(text: str, fits) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer) or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
