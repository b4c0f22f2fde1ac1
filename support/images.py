"""Images on disk: finding and reading them, PNG files that hold their settings, many images on one."""

import os
import re
import textwrap
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from support.errors import InputError
from support.files import replaced

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LARGEST, MOST = 2**28, 2**26  # bytes of a file, and pixels
LONGEST = 32  # times the shorter side: 1 x 4000 pixels would take gigabytes when resized
TURN = Image.Transpose  # by the numbers of EXIF, which say how the camera was held
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
TURNS |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}


def find_images(folder: Path) -> list[Path]:
    """All images in a folder and the folders in it, but sample.py's sheet.png. Raises InputError if there are none."""
    files = find_files(folder, lambda name: name.lower().endswith(SUFFIXES) and name != "sheet.png")
    if not files:
        raise InputError(f"{folder} holds no images ({', '.join(SUFFIXES)}); check the path")
    return files


def find_files(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """The files of wanted names in a folder tree, in natural order. Each folder is visited once, links included."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; check the path")
    files, seen, places = [], set(), [folder]
    for place in places:  # grows while it runs
        if os.path.realpath(place) in seen:
            continue
        seen.add(os.path.realpath(place))
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if entry.is_dir() and not is_hidden(entry.name):
                places.append(entry.path)
            elif wanted(entry.name) and not is_hidden(entry.name):
                files.append(Path(entry.path))
    return sorted(files, key=natural)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")  # what macOS and network storages put there


def natural(file: Path) -> tuple[list, Path]:
    """Sorts numbers in names by value: 2.png before 10.png."""
    parts = re.split("([0-9]+)", str(file))  # text, number, text, number, ..., text
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file


def read_image(file: Path | BytesIO, upright: bool = False, on_white: bool = False) -> Image.Image:
    """Any image as RGB. `upright`: turned as its EXIF says. `on_white`: white shows through; else all is opaque.

    Raises ValueError if it is damaged, or too large to be read in little memory.
    """
    try:
        if isinstance(file, Path) and file.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST:,} bytes")
        # Warnings are about tags that nobody needs.
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            size = f"{image.width} x {image.height} pixels"
            if image.width * image.height > MOST:
                raise ValueError(f"{size} are more than {MOST:,}")
            image.load()
            turn = TURNS.get(orientation(image)) if upright else None
            image = to_rgb(middle(image), on_white)
            return image if turn is None else image.transpose(turn)
    except Exception as error:  # pillow has many ways to say that a file is damaged
        raise ValueError(f"cannot be read: {error or type(error).__name__}") from None


def middle(image: Image.Image) -> Image.Image:
    """Of an image over LONGEST times as long as wide, the middle; with its short side resized, it would fill memory."""
    width, height = image.size
    across, down = min(width, LONGEST * height), min(height, LONGEST * width)
    left, top = (width - across) // 2, (height - down) // 2
    return image if (across, down) == image.size else image.crop((left, top, left + across, top + down))


def orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(0x0112)
    except Exception:  # broken EXIF, of an image that may be fine
        return None


def to_rgb(image: Image.Image, on_white: bool) -> Image.Image:
    """An image of any mode as RGB. 16 bits of grey keep their upper 8, as 16 bits of color do in pillow."""
    if image.mode[0] in "IF":
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its levels of grey are of neither 8 nor 16 bits")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
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
    except Exception:  # as above
        return {}
    return settings if settings.get("software") == "proreflow" or {"index", "weights"} <= settings.keys() else {}


def save_png(image: np.ndarray, file: Path, settings: dict[str, str]) -> None:
    """Write an image (H, W, 3) with its settings in its text chunk."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_itxt(name, value)
    write_png(Image.fromarray(image), file, info)


def write_png(image: Image.Image, file: Path, info: PngInfo | None = None) -> None:
    with replaced(file) as aside:
        image.save(aside, format="PNG", pnginfo=info)


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
        lines = textwrap.wrap(caption, width * zoom // 6)  # a letter is about 5 pixels wide
        pen.multiline_text((x, y + height * zoom + 2), "\n".join(lines[:2]), "black", spacing=1)
    return sheet
