"""Images as others left them: found, read alike for all uses, or refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from support import images
from support.errors import InputError
from support.images import find_images, read_image

RGB = Image.fromarray(np.random.default_rng(8).integers(0, 256, (20, 30, 3), dtype=np.uint8))
GREY, CLEAR = Image.new("L", (30, 20), 100), Image.new("L", (30, 20), 0)
DEEP = (np.arange(600, dtype=np.uint16) * 109).reshape(20, 30)  # 16 bits of grey


def saved(image, kind="png", **settings):
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


def pixels(content, **settings):
    image = read_image(io.BytesIO(content), **settings)
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
    for link, folder in ("t/a/circle", "t"), ("other/back", "t/a"), ("t/link", "other"), ("t/link2", "other"):
        (tmp_path / link).symlink_to(tmp_path / folder)
    found = [file.relative_to(tmp_path / "t").as_posix() for file in find_images(tmp_path / "t")]
    assert found == ["a/9.JPG", "a/10.png", "b.webp", "link/1.tiff"]
    assert len(find_images(tmp_path / "t/a/.hidden")) == 1  # a hidden folder that was asked for
    for folder, reason in (tmp_path / "nowhere", "is no folder"), (tmp_path / "t/folder.png", "holds no images"):
        with pytest.raises(InputError, match=reason):
            find_images(folder)


@pytest.mark.parametrize(
    "image, kind, settings, level",
    [
        (Image.fromarray(DEEP), "png", {}, DEEP // 256),
        (Image.fromarray(DEEP.astype(np.int32)).convert("I;16B"), "tiff", {}, DEEP // 256),
        (Image.fromarray(DEEP.astype(np.int32)), "tiff", {}, DEEP // 256),
        (GREY.convert("1", dither=0), "bmp", {}, 0),
        (GREY.convert("CMYK"), "tiff", {}, 100),
        (Image.merge("RGBA", (GREY, GREY, GREY, CLEAR)), "png", {}, 100),
        (Image.merge("LA", (GREY, CLEAR)), "png", {}, 100),
        (GREY.convert("P"), "png", {"transparency": bytes(256)}, 100),
        (GREY, "png", {"transparency": 100}, 100),
    ],
)
def test_images_of_any_mode_become_rgb_opaque_or_on_white(image, kind, settings, level):
    content = saved(image, kind, **settings)
    transparent = settings or "A" in image.mode
    assert np.array_equal(pixels(content), np.broadcast_to(level, (20, 30))[..., None].repeat(3, 2))
    assert np.array_equal(pixels(content, on_white=True), np.full((20, 30, 3), 255) if transparent else pixels(content))


def exif(turn, resolution=(1, 1)):
    """EXIF that says how the camera was held, and a resolution: a fraction, which broken writers make -1 / 0."""
    header, more = struct.pack("<IH", 8, 2), bytes(4)
    entries = struct.pack("<HHII", 0x0112, 3, 1, turn) + struct.pack("<HHII", 282, 10, 1, 38)
    return b"Exif\0\0II*\0" + header + entries + more + struct.pack("<ii", *resolution)


@pytest.mark.parametrize("turn", range(1, 9))
def test_images_are_turned_upright_as_pillow_does(turn):
    content = saved(RGB, exif=exif(turn))
    assert np.array_equal(pixels(content, upright=True), ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert np.array_equal(pixels(content), RGB)


@pytest.mark.parametrize(
    "content, upright",
    [(exif(6, resolution=(-1, 0)), True), (exif(77), False), (exif(6)[:12], False), (b"Exif\0\0" + bytes(50), False)],
    ids=["a resolution of -1 / 0", "an unknown orientation", "cut short", "zeros"],
)
def test_broken_exif_does_no_harm(content, upright):
    assert pixels(saved(RGB, exif=content), upright=True).shape == ((30, 20, 3) if upright else (20, 30, 3))


def png(width, height):
    """A PNG file of that many pixels, none of which are there."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")
    packed = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_of_a_very_long_image_the_middle_is_read():
    """With its short side resized to 512 pixels, one of 1 x 4000 would have a thousand million."""
    shades = np.arange(100, dtype=np.uint8)[None].repeat(2, axis=0)
    assert np.array_equal(pixels(saved(Image.fromarray(shades)))[0, :, 0], range(18, 82))  # 64 = 32 times 2


def test_what_would_take_too_much_memory_or_cannot_be_known_is_refused(tmp_path, monkeypatch):
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    for content, reason in (
        (png(60000, 60000), "pixels"),
        (png(8200, 8200), "8200 x 8200 pixels are more than 67,108,864"),
        (saved(RGB, pnginfo=text), "too large"),
        (saved(RGB.convert("F"), "tiff"), "levels of grey"),
        (saved(Image.fromarray(DEEP.astype(np.int32) - 1), "tiff"), "levels of grey"),
        (b"no image", "cannot identify"),
        (saved(RGB, "jpeg")[:400], "cannot be read"),
    ):
        with pytest.raises(ValueError, match=reason):
            pixels(content, upright=True)
    monkeypatch.setattr(images, "LARGEST", 100)
    (tmp_path / "x.png").write_bytes(saved(RGB))
    for name, reason in ("nowhere.png", "No such file"), ("x.png", "larger than 100 bytes"):
        with pytest.raises(ValueError, match=reason):
            read_image(tmp_path / name)
