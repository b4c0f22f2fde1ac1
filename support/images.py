"""Images on disk: finding and reading them, PNG files that hold their settings, many images on one."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def settings_of_png(file: Path) -> dict[str, str]:
    """The text chunk of one of our images; empty if there is none, or no readable image."""
    try:
        with Image.open(file) as image:
            return dict(image.text)
    except (OSError, AttributeError, SyntaxError):
        return {}


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


def on_white(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; what is transparent shows white."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


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
