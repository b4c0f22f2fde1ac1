"""Images as others left them: found, read alike for all uses, or refused with a reason."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from support import images
from support.errors import InputError
from support.images import find_images, read_image, settings_of_png

RGB = Image.fromarray(np.random.default_rng(8).integers(0, 256, (20, 30, 3), dtype=np.uint8))
DEEP = (np.arange(600, dtype=np.uint16) * 109).reshape(20, 30)  # 16 bits of grey


def pixels(file, **settings):
    image = read_image(file, **settings)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_images_are_found_in_natural_order_and_nothing_that_is_hidden(tmp_path):
    for name in (
        "t/a/10.png", "t/a/9.JPG", "t/a/.hidden/1.png", "t/.ipynb_checkpoints/9-checkpoint.jpg", "t/__MACOSX/9.png",
        "t/._b.png", "t/.b.png", "t/@eaDir/b.png", "t/sheet.png", "t/notes.txt", "t/b.webp", "other/1.tiff",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "t/folder.png").mkdir()
    (tmp_path / "t/a/circle").symlink_to(tmp_path / "t")
    (tmp_path / "other/back").symlink_to(tmp_path / "t/a")
    (tmp_path / "t/link").symlink_to(tmp_path / "other")
    (tmp_path / "t/link2").symlink_to(tmp_path / "other")
    found = [file.relative_to(tmp_path / "t").as_posix() for file in find_images(tmp_path / "t")]
    assert [name.replace("link2", "link") for name in found] == ["a/9.JPG", "a/10.png", "b.webp", "link/1.tiff"]
    assert len(find_images(tmp_path / "t/a/.hidden")) == 1  # a hidden folder that was asked for
    for folder, reason in (tmp_path / "nowhere", "is no folder"), (tmp_path / "t/folder.png", "holds no images"):
        with pytest.raises(InputError, match=reason):
            find_images(folder)


@pytest.mark.parametrize("mode, ending", [("L", "png"), ("1", "bmp"), ("P", "png"), ("CMYK", "tif"), ("LA", "png")])
def test_images_of_any_mode_are_read_as_pillow_does(tmp_path, mode, ending):
    RGB.convert(mode).save(tmp_path / f"x.{ending}")
    with Image.open(tmp_path / f"x.{ending}") as image:
        assert np.array_equal(pixels(tmp_path / f"x.{ending}"), image.convert("RGB"))


@pytest.mark.parametrize("mode, ending", [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"), ("I", "tif")])
def test_16_bits_of_grey_are_scaled(tmp_path, mode, ending):
    image = Image.fromarray(DEEP) if mode == "I;16" else Image.fromarray(DEEP.astype(np.int32)).convert(mode)
    image.save(tmp_path / f"x.{ending}")
    for settings in {}, {"upright": True, "on_white": True}:
        assert np.array_equal(pixels(tmp_path / f"x.{ending}", **settings), (DEEP // 256)[..., None].repeat(3, 2))


@pytest.mark.parametrize("mode, ending", [("RGBA", "png"), ("RGBA", "webp"), ("LA", "png"), ("P", "png")])
def test_what_is_transparent_is_white_or_as_if_opaque(tmp_path, mode, ending):
    color = Image.new("L", (8, 8), 100)
    image = Image.merge("LA", (color, Image.new("L", (8, 8), 0))) if mode == "LA" else color.convert(mode)
    image.putalpha(0) if mode == "RGBA" else None
    settings = {"transparency": bytes(256)} if mode == "P" else {"exact": True, "lossless": True}
    image.save(tmp_path / f"x.{ending}", **settings)
    assert (pixels(tmp_path / f"x.{ending}", on_white=True) == 255).all()
    assert (pixels(tmp_path / f"x.{ending}") == 100).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_images_are_turned_upright_as_pillow_does(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    RGB.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(pixels(tmp_path / "x.png", upright=True), ImageOps.exif_transpose(image))
        assert np.array_equal(pixels(tmp_path / "x.png"), image)


def exif(*entries):
    """EXIF as broken writers make it: (tag, type, count, value) each."""
    out, body, start = b"II*\0" + struct.pack("<IH", 8, len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            value, body = struct.pack("<I", start + len(body)), body + value
        out += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0" + out + bytes(4) + body


TURNED = 0x0112, 3, 1, struct.pack("<H", 6)


@pytest.mark.parametrize(
    "content, upright",
    [
        (exif(TURNED, (282, 10, 1, struct.pack("<ii", -1, 0))), True),  # a resolution of -1 / 0
        (exif(TURNED, (282, 2, 3, b"72\0")), True),  # as text
        (exif(TURNED, (296, 2, 2, b"2\0")), True),
        (exif(TURNED, (257, 2, 5, b"desc\0")), True),
        (exif((0x0112, 2, 6, b"right\0")), False),  # an orientation in words
        (exif((0x0112, 3, 1, struct.pack("<H", 77))), False),
        (exif(TURNED)[:20], False),
        (b"Exif\0\0" + bytes(50), False),
    ],
)
def test_broken_exif_does_no_harm(tmp_path, content, upright):
    RGB.save(tmp_path / "x.jpg", exif=content)
    assert read_image(tmp_path / "x.jpg", upright=True).size == ((20, 30) if upright else (30, 20))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def saved(image, kind="png", **settings):
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


def test_what_would_take_too_much_memory_or_cannot_be_known_is_refused(tmp_path, monkeypatch):
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    for content, reason in (
        (saved(Image.new("RGB", (1, 4000))), "1 x 4000 pixels: one side is more than 32 times the other"),
        (png(60000, 60000, chunk(b"IDAT", b"")), "pixels"),
        (png(8200, 8200, chunk(b"IDAT", b"")), "8200 x 8200 pixels are more than 67,108,864"),
        (saved(RGB, pnginfo=text), "too large"),
        (saved(RGB.convert("F"), "tiff"), "levels of grey"),
        (saved(Image.fromarray(DEEP.astype(np.int32) - 1), "tiff"), "levels of grey"),
        (b"no image", "cannot identify"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_image(io.BytesIO(content), upright=True)
    with pytest.raises(ValueError, match="No such file"):
        read_image(tmp_path / "nowhere.png")
    RGB.save(tmp_path / "x.png")
    monkeypatch.setattr(images, "LARGEST", 100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff", "bmp"])
def test_damaged_images_are_value_errors_or_images(tmp_path, kind):
    draw, whole, failed = random.Random(0), saved(RGB, kind, exif=exif(TURNED)), 0
    for trial in range(200):
        content = bytearray(whole[: draw.randrange(9, len(whole))] if trial % 3 == 0 else whole)
        for _ in range(draw.choice([1, 2, 5])):
            content[draw.randrange(2, len(content))] = draw.randrange(256)
        try:
            read_image(io.BytesIO(content), upright=True, on_white=True)
        except ValueError:
            failed += 1
        if kind == "png":
            (tmp_path / "x").write_bytes(content)
            settings_of_png(tmp_path / "x")  # raises nothing
    assert failed >= 50
