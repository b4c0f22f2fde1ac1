"""FID: the network against an independent computation, preparation and distance against known answers, the command.

The reference of the network, `reference`, was written from the figures of Szegedy et al. 2015 and the layer table of
the published file, in another way than `fid.py`: from a table, with torch.nn.functional in float64, batch norm as its
formula, average pools as a ratio of two sums. It is given the same random weights, running statistics included.
"""

import os
import subprocess
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from helpers import ONE_THREAD, exit_code, refusal
from PIL import Image
from safetensors.torch import save_file

import fid
from evaluation.clip_score import ClipScore
from support.images import save_png

ROOT = Path(fid.__file__).parent
MINIATURE_CLIP = ROOT / "weights/miniature-clip"

# the convolutions of each branch: (name, outputs, kernel height, kernel width, stride)
A = [
    [("branch1x1", 64, 1, 1, 1)],
    [("branch5x5_1", 48, 1, 1, 1), ("branch5x5_2", 64, 5, 5, 1)],
    [("branch3x3dbl_1", 64, 1, 1, 1), ("branch3x3dbl_2", 96, 3, 3, 1), ("branch3x3dbl_3", 96, 3, 3, 1)],
]
B = [
    [("branch3x3", 384, 3, 3, 2)],
    [("branch3x3dbl_1", 64, 1, 1, 1), ("branch3x3dbl_2", 96, 3, 3, 1), ("branch3x3dbl_3", 96, 3, 3, 2)],
]
D = [
    [("branch3x3_1", 192, 1, 1, 1), ("branch3x3_2", 320, 3, 3, 2)],
    [
        ("branch7x7x3_1", 192, 1, 1, 1), ("branch7x7x3_2", 192, 1, 7, 1), ("branch7x7x3_3", 192, 7, 1, 1),
        ("branch7x7x3_4", 192, 3, 3, 2),
    ],
]  # fmt: skip
E = [
    [("branch1x1", 320, 1, 1, 1)],
    [("branch3x3_1", 384, 1, 1, 1), [("branch3x3_2a", 384, 1, 3, 1), ("branch3x3_2b", 384, 3, 1, 1)]],
    [
        ("branch3x3dbl_1", 448, 1, 1, 1), ("branch3x3dbl_2", 384, 3, 3, 1),
        [("branch3x3dbl_3a", 384, 1, 3, 1), ("branch3x3dbl_3b", 384, 3, 1, 1)],
    ],
]  # fmt: skip


def branches_c(n):
    return [
        [("branch1x1", 192, 1, 1, 1)],
        [("branch7x7_1", n, 1, 1, 1), ("branch7x7_2", n, 1, 7, 1), ("branch7x7_3", 192, 7, 1, 1)],
        [
            ("branch7x7dbl_1", n, 1, 1, 1), ("branch7x7dbl_2", n, 7, 1, 1), ("branch7x7dbl_3", n, 1, 7, 1),
            ("branch7x7dbl_4", n, 7, 1, 1), ("branch7x7dbl_5", 192, 1, 7, 1),
        ],
    ]  # fmt: skip


BLOCKS = [  # name, branches, pool, outputs of the convolution after it
    ("Mixed_5b", A, "average", 32), ("Mixed_5c", A, "average", 64), ("Mixed_5d", A, "average", 64),
    ("Mixed_6a", B, "shrink", None), ("Mixed_6b", branches_c(128), "average", 192),
    ("Mixed_6c", branches_c(160), "average", 192), ("Mixed_6d", branches_c(160), "average", 192),
    ("Mixed_6e", branches_c(192), "average", 192), ("Mixed_7a", D, "shrink", None), ("Mixed_7b", E, "average", 192),
    ("Mixed_7c", E, "max", 192),
]  # fmt: skip


def average_of_what_exists(x):
    ones = torch.ones_like(x[:, :1])
    total, count = (F.conv2d(y.flatten(0, 1)[:, None], ones.new_ones(1, 1, 3, 3), padding=1) for y in (x, ones))
    return total.view_as(x) / count.view_as(ones)


POOLS = {
    "average": average_of_what_exists,
    "max": lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, 1),
    "shrink": lambda x: F.max_pool2d(x, 3, 2),
    "ordinary": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)), x.new_ones(x.shape[1], 1, 3, 3) / 9, groups=x.shape[1]),
}


class Reference:
    def __init__(self, state):
        self.state = {name: weight.double() for name, weight in state.items()}
        self.used = {"fc.weight", "fc.bias"}

    def conv(self, x, name, outputs, height, width, stride, padding=None):
        keys = [f"{name}.{k}" for k in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")]
        self.used |= set(keys)
        weight, scale, shift, mean, var = (self.state[key] for key in keys)
        assert weight.shape == (outputs, x.shape[1], height, width)
        if padding is None:
            padding = ((height - 1) // 2, (width - 1) // 2) if stride == 1 else 0
        y = F.conv2d(x, weight, stride=stride, padding=padding)
        y = (y - mean[:, None, None]) / (var[:, None, None] + 0.001) ** 0.5
        return (y * scale[:, None, None] + shift[:, None, None]).clamp(min=0)

    def block(self, x, name, branches, pool, pool_outputs):
        outputs = []
        for branch in branches:
            y = x
            for layer in branch:
                split = layer if isinstance(layer, list) else [layer]
                y = torch.cat([self.conv(y, f"{name}.{part[0]}", *part[1:]) for part in split], 1)
            outputs.append(y)
        pooled = POOLS[pool](x)
        outputs.append(self.conv(pooled, f"{name}.branch_pool", pool_outputs, 1, 1, 1) if pool_outputs else pooled)
        return torch.cat(outputs, 1)

    def __call__(self, images):
        x = self.conv(2 * images.double() - 1, "Conv2d_1a_3x3", 32, 3, 3, 2)
        x = self.conv(x, "Conv2d_2a_3x3", 32, 3, 3, 1, padding=0)
        x = POOLS["shrink"](self.conv(x, "Conv2d_2b_3x3", 64, 3, 3, 1))
        x = self.conv(x, "Conv2d_3b_1x1", 80, 1, 1, 1)
        x = POOLS["shrink"](self.conv(x, "Conv2d_4a_3x3", 192, 3, 3, 1, padding=0))
        for block in BLOCKS:
            x = self.block(x, *block)
        return x.flatten(2).mean(2)


@pytest.fixture
def network(inception):
    return inception


@pytest.fixture
def weights(inception_file):
    return inception_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sets of small images of mixed sizes, with a folder inside a folder."""
    rng = np.random.default_rng(0)
    made = []
    for name, count, level in ("reference", 3, 256), ("generated", 2, 160):
        folder = tmp_path_factory.mktemp(name)
        (folder / "more/still more").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, level, (6 + i, 9, 3), dtype=np.uint8)
            place = folder / "more/still more" if i % 2 else folder
            Image.fromarray(pixels).resize((40 + 10 * i, 64), Image.Resampling.BICUBIC).save(place / f"{i}.png")
        made.append(folder)
    return made


PLAIN = ["--workers", "0", "--device", "cpu"]


def command(*arguments, processes=1):
    """Run fid.py as a user does, with several processes."""
    line = helpers.command(fid, *arguments, *PLAIN, processes=processes, torchrun=True)
    return subprocess.run(line, capture_output=True, text=True, env=ONE_THREAD)


def run(*arguments):
    return exit_code(fid, *arguments, *PLAIN)


def statistics_of(folder, network, mode="clean", crop=None):
    plain = fid.Network("", 2048, fid.MODES[mode], network)
    return fid.statistics(folder, plain, crop, batch_size=2, workers=0)


# ---- the network


def test_the_network_computes_what_the_reference_computes(network):
    images = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(2))
    images[1, :, 100:] = images[1, :, 100:101]  # another texture
    reference = Reference(network.state_dict())
    features, expected = network(images), reference(images)
    assert features.shape == (2, 2048)
    assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().mean() > 0.01  # a reference that says something
    assert (features - expected).norm() / expected.norm() < 1e-4
    assert (features - expected).abs().max() / expected.abs().max() < 1e-4
    assert reference.used == {name for name in network.state_dict() if not name.endswith("num_batches_tracked")}


def test_the_network_has_the_size_of_the_published_one():
    """Inception v3 without its auxiliary classifier has 23,834,568 parameters and 1000 classes; 8 more of 2048 + 1."""
    assert sum(weight.numel() for weight in fid.Inception().parameters()) == 23_834_568 + 8 * 2049


@pytest.mark.parametrize("name", ["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6e", "Mixed_7b", "Mixed_7c"])
def test_pools_differ_from_the_ordinary_inception(network, name):
    """A and C: 5x, 6x. E1: 7b. E2: 7c."""
    block = getattr(network, name)
    x = torch.rand(1, block.branch_pool.conv.in_channels, 4, 5, generator=torch.Generator().manual_seed(3))
    spec = next(spec for spec in BLOCKS if spec[0] == name)
    reference = Reference(network.state_dict())
    ours, ordinary = block(x), reference.block(x.double(), *spec[:2], "ordinary", spec[3])
    expected = torch.full_like(x, torch.nan)
    for i in range(4):
        for j in range(5):  # by hand: the neighborhood, as far as it exists
            there = x[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].flatten(2)
            expected[:, :, i, j] = there.amax(2) if name == "Mixed_7c" else there.mean(2)
    expected = reference.conv(expected.double(), f"{name}.branch_pool", spec[3], 1, 1, 1)
    pooled = ours[:, -spec[3] :]
    torch.testing.assert_close(pooled.double(), expected, atol=1e-4, rtol=1e-4)
    assert (pooled - ordinary[:, -spec[3] :]).abs().max() > 0.1  # so the ordinary one would not pass


def test_a_safetensors_copy_loads_the_same(network, weights, tmp_path):
    state = {name: w for name, w in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "inception.safetensors")
    for file in weights, tmp_path / "inception.safetensors":
        loaded = fid.Inception().load(file)
        assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in state.items())
        assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())


def test_another_networks_file_is_refused(network, tmp_path):
    file = tmp_path / "other.pth"

    def message(**changes):
        state = {k.replace(".", "__"): v for k, v in network.state_dict().items()} | changes
        torch.save({k.replace("__", "."): v for k, v in state.items() if v is not None}, file)
        return refusal(fid.Inception().load, file)

    ordinary = message(fc__weight=torch.zeros(1000, 2048), fc__bias=torch.zeros(1000))
    assert "fc.bias is torch.float32 (1000,), should be torch.float32 (1008,), fc.weight is" in ordinary
    assert "1 that it does not have (AuxLogits.fc.bias)" in message(AuxLogits__fc__bias=torch.zeros(8))
    assert "1 missing (Mixed_7c.branch_pool.bn.running_var)" in message(Mixed_7c__branch_pool__bn__running_var=None)
    assert "torch.float16 (1008,)" in message(fc__bias=torch.zeros(1008).half())
    assert fid.PUBLISHED in ordinary


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_missing_damaged_or_harmful_file_is_refused(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load = fid.Inception().load
    missing = refusal(load, tmp_path / "none.pth")
    assert "none.pth is missing" in missing and fid.PUBLISHED in missing and "--weights" in missing
    files = {"cut.pth": weights.read_bytes()[: 2**20], "page.pth": b"<html>", "empty.pth": b"", "cut.safetensors": b"1"}
    for name, content in files.items():
        Path(name).write_bytes(content)
        assert f"{name} is damaged, truncated or no plain state dict" in refusal(load, name)
    torch.save({"fc.weight": Harmful()}, "harmful.pth")
    assert "harmful.pth is damaged" in refusal(load, "harmful.pth")
    assert not Path("harm").exists()
    torch.save({"model": {"fc.weight": torch.zeros(2)}}, "nested.pth")
    assert "not only tensors" in refusal(load, "nested.pth")


def test_images_of_another_size_are_refused(network):
    assert "(B, 3, 299, 299)" in refusal(network, torch.zeros(1, 3, 256, 256))


# ---- what it is shown


def bicubic(samples, size):
    """Rows of samples -> `size` of them by the cubic of Keys 1981 with a = -0.5, widened where it shrinks: by hand."""
    scale = len(samples) / size
    width = max(scale, 1.0)
    out = np.empty((size, *samples.shape[1:]))
    for i in range(size):
        middle = (i + 0.5) * scale
        places = np.arange(max(int(middle - 2 * width + 0.5), 0), min(int(middle + 2 * width + 0.5), len(samples)))
        t = np.abs((places + 0.5 - middle) / width)
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        kernel = np.where(t < 1, near, np.where(t < 2, far, 0))
        out[i] = np.tensordot(kernel / kernel.sum(), samples[places], 1)
    return out


def bilinear(samples, size):
    """Rows of samples -> `size` of them, each between its two nearest, however many are left out."""
    place = ((np.arange(size) + 0.5) * len(samples) / size - 0.5).clip(0, len(samples) - 1)
    low = np.floor(place).astype(int)
    high = (low + 1).clip(max=len(samples) - 1)
    part = (place - low)[:, None, None]
    return samples[low] * (1 - part) + samples[high] * part


@pytest.mark.parametrize("height, width", [(40, 410), (512, 64), (299, 299)])
@pytest.mark.parametrize("mode, rows, scale", [("clean", bicubic, 256), ("legacy", bilinear, 255)])
def test_resize_modes_have_known_answers(mode, rows, scale, height, width):
    """Shrinking and enlarging. Noise of full contrast: bicubic overshoots, and clipping or rounding would show."""
    pixels = np.random.default_rng(4).choice([0, 255, 77], (height, width, 3)).astype(np.uint8)
    expected = rows(rows(pixels.astype(float), 299).transpose(1, 0, 2), 299).transpose(2, 1, 0) / scale
    shown = fid.MODES[mode](Image.fromarray(pixels))
    assert shown.shape == (3, 299, 299) and shown.dtype == torch.float32
    np.testing.assert_allclose(shown, expected, atol=1e-4)  # a fortieth of a level of grey
    if mode == "clean" and (height, width) != (299, 299):
        assert expected.max() > 1.02 and expected.min() < -0.02


def test_clean_is_pils_own_bicubic_on_each_channel_of_floats():
    pixels = np.random.default_rng(5).integers(0, 256, (61, 500, 3), dtype=np.uint8)
    shown = fid.clean(Image.fromarray(pixels)).numpy()
    for c in range(3):
        channel = Image.frombytes("F", (500, 61), pixels[..., c].astype("<f4").tobytes())
        np.testing.assert_array_equal(shown[c] * 256, np.array(channel.resize((299, 299), Image.BICUBIC)))


class Stop(Exception):
    pass


def test_the_network_sees_minus_one_to_one_in_full_precision(network, monkeypatch):
    """Legacy: 0..255 is -1..1. Clean: (x - 128) / 128."""
    seen = []

    def look(x):
        seen.append((float(x.mean()), torch.backends.cudnn.allow_tf32))
        raise Stop

    monkeypatch.setattr(network.Conv2d_1a_3x3, "forward", look)
    for mode in "legacy", "clean":
        for level in 0, 128, 255:
            with pytest.raises(Stop):
                network(fid.MODES[mode](Image.new("RGB", (50, 60), (level,) * 3))[None])
    values, tf32 = zip(*seen)
    assert values == pytest.approx([-1, 1 / 255, 1, -1, 0, 127 / 128], abs=1e-6)
    assert not any(tf32)


def test_protocols_crop_and_resize_as_written():
    wide = Image.fromarray(np.random.default_rng(6).integers(0, 256, (301, 640, 3), dtype=np.uint8))
    lanczos = Image.Resampling.LANCZOS
    square = wide.crop((170, 0, 471, 301))  # (640 - 301) / 2 = 169.5, to the even number
    for name, size in ("coco2014-30k", 256), ("coco2014-10k", 512):
        np.testing.assert_array_equal(fid.PROTOCOLS[name].crop(wide), square.resize((size, size), lanczos))
    scaled = wide.resize((1088, 512), lanczos)  # 640 x 512 / 301 = 1088.6
    np.testing.assert_array_equal(fid.PROTOCOLS["coco2017-5k"].crop(wide), scaled.crop((288, 0, 800, 512)))
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert fid.PROTOCOLS["coco2017-5k"].crop(tall).size == (512, 512)
    made = Image.fromarray(np.random.default_rng(7).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    np.testing.assert_array_equal(fid.PROTOCOLS["coco2017-5k"].crop(made), made)  # generated ones stay as they are
    assert {name: p.mode for name, p in fid.PROTOCOLS.items()} == {
        "none": "clean", "coco2014-30k": "clean", "coco2017-5k": "legacy", "coco2014-10k": "clean"
    }  # fmt: skip


def test_images_of_every_kind_are_read_as_rgb(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(8).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    rgb.resize((8, 8)).save(tmp_path / "1.jpg")
    rgb.save(tmp_path / "2.webp", lossless=True)
    rgb.convert("L").save(tmp_path / "3.png")
    rgb.convert("CMYK").save(tmp_path / "4.JPEG")
    alpha = rgb.copy()
    alpha.putalpha(rgb.convert("L"))
    alpha.save(tmp_path / "5.PNG")
    rgb.quantize(16).save(tmp_path / "6.png", transparency=3)
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(tmp_path / "7.png")
    rgb.convert("1").save(tmp_path / "8.png")
    (tmp_path / "notes.txt").write_text("not an image")
    rgb.save(tmp_path / "sheet.png")  # sample.py's overview
    rgb.save(tmp_path / "._1.png")
    files = fid.find_images(tmp_path)
    assert [file.name for file in files] == ["1.jpg", "2.webp", "3.png", "4.JPEG", "5.PNG", "6.png", "7.png", "8.png"]
    read = [np.array(fid.read_image(file)) for file in files]
    assert all(pixels.shape[2:] == (3,) and pixels.dtype == np.uint8 for pixels in read)
    for lossless in read[1], read[4]:
        np.testing.assert_array_equal(lossless, rgb)
    np.testing.assert_array_equal(read[2], np.array(rgb.convert("L"))[..., None].repeat(3, 2))
    assert np.abs(read[3].astype(int) - rgb).mean() < 40  # JPEG of noise
    np.testing.assert_array_equal(read[5], rgb.quantize(16).convert("RGB"))
    np.testing.assert_array_equal(read[6][..., 0], (np.arange(600) * 100 // 256).reshape(20, 30))


# ---- statistics


def test_statistics_are_mean_and_covariance_of_all_features(folders):
    """Streamed in batches of 2, of images of many sizes; features with a mean much larger than their spread."""

    def features(inputs):
        return inputs.flatten(2).mean(2) + inputs.flatten(2)[..., 0] + 30  # (B, 3)

    network = fid.Network("", 3, fid.legacy, features)
    images = [Image.open(file).convert("RGB") for file in fid.find_images(folders[0])]
    x = np.concatenate([features(fid.legacy(image)[None]).double() for image in images])
    stats = fid.statistics(folders[0], network, None, batch_size=2, workers=0)
    np.testing.assert_allclose(stats.mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.sigma, np.cov(x.T), rtol=1e-7, atol=1e-10)
    assert stats.count == 3
    other = fid.statistics(folders[0], network, None, batch_size=3, workers=2)  # read by other processes
    np.testing.assert_allclose(other.sigma, stats.sigma, rtol=1e-4)


def test_statistics_files_are_those_of_the_common_tools(folders, network, tmp_path):
    stats = fid.Statistics(np.arange(3.0), np.eye(3), 7, "a name")
    stats.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as content:
        np.testing.assert_array_equal(content["mu"], stats.mu)
        np.testing.assert_array_equal(content["sigma"], stats.sigma)
        assert content["mu"].dtype == content["sigma"].dtype == np.float64
    again = fid.load_statistics(tmp_path / "ours.npz")
    assert (again.count, again.name) == (7, "a name") and np.array_equal(again.sigma, stats.sigma)
    np.savez_compressed(tmp_path / "theirs.npz", mu=stats.mu.astype(np.float32), sigma=stats.sigma)
    theirs = fid.load_statistics(tmp_path / "theirs.npz")
    assert theirs.count is None and theirs.name == "" and theirs.mu.dtype == np.float64
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours.npz", "theirs.npz"]


def test_bad_statistics_files_are_refused(tmp_path):
    file = tmp_path / "s.npz"

    def message(**content):
        np.savez(file, **content)
        return refusal(fid.load_statistics, file)

    eye = np.eye(3)
    assert "does not exist" in refusal(fid.load_statistics, file)
    assert "has no mu and sigma" in message(mean=eye)
    assert "should be (D,) and (D, D)" in message(mu=np.zeros(4), sigma=eye)
    assert "finite and symmetric" in message(mu=np.array([0, np.nan, 0]), sigma=eye)
    assert "finite and symmetric" in message(mu=np.zeros(3), sigma=np.triu(np.ones((3, 3))))
    assert "has no mu and sigma" in message(mu=np.array([{}], dtype=object), sigma=eye)  # would have to be unpickled
    np.savez(file, mu=np.zeros(3), sigma=eye)
    file.write_bytes(file.read_bytes()[:300])
    assert "is damaged" in refusal(fid.load_statistics, file)


def colors(tmp_path, good, bad):
    for i in range(good):
        Image.new("RGB", (9, 9), (i % 256, 2 * i % 256, i * i % 256)).save(tmp_path / f"{i:03d}.png")
    for i in range(bad):
        (tmp_path / f"bad{i}.png").write_bytes((tmp_path / "000.png").read_bytes()[: 37 + i])
    return fid.Network("", 3, fid.legacy, lambda inputs: inputs[:, :, 0, 0])


@pytest.mark.parametrize("good, bad, fits", [(5, 1, True), (5, 2, False), (199, 2, True), (199, 3, False)])
def test_an_unreadable_image_is_skipped_counted_and_named(tmp_path, capsys, good, bad, fits):
    network = colors(tmp_path, good, bad)
    if fits:
        stats = fid.statistics(tmp_path, network, None, batch_size=4, workers=0)
        pixels = np.array([(i % 256, 2 * i % 256, i * i % 256) for i in range(good)]) / 255
        np.testing.assert_allclose(stats.mu, pixels.mean(0), rtol=1e-6)
        assert stats.count == good
    else:
        message = refusal(fid.statistics, tmp_path, network, None, batch_size=4, workers=0)
        assert f"{bad} of {good + bad} images cannot be read" in message
    told = capsys.readouterr().err
    assert all(f"skipped, cannot be read: {tmp_path}/bad{i}.png" in told for i in range(bad))


def test_fewer_than_two_images_are_an_error(tmp_path):
    network = colors(tmp_path, 1, 1)
    assert "has 1 readable images; a covariance needs 2" in refusal(fid.statistics, tmp_path, network, None, 4, 0)
    (tmp_path / "empty").mkdir()
    assert "has 0 readable images" in refusal(fid.statistics, tmp_path / "empty", network, None, 4, 0)
    assert "neither a folder of images nor an .npz" in refusal(fid.statistics, tmp_path / "no", network, None, 4, 0)


def test_features_that_are_not_finite_are_an_error(tmp_path):
    network = colors(tmp_path, 3, 0)
    network.features = lambda inputs: inputs[:, :, 0, 0] / 0
    assert "not finite" in refusal(fid.statistics, tmp_path, network, None, 4, 0)


# ---- the distance


def rotation(rng, d):
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def covariance(rng, spectrum):
    """A random symmetric matrix with these eigenvalues."""
    q = rotation(rng, len(spectrum))
    c = q * spectrum @ q.T
    return (c + c.T) / 2


D_ = 160
SPECTRA = {
    "flat": np.ones(D_),
    "decaying": np.exp(-np.linspace(0, 20, D_)),
    "beyond float64": np.exp(-np.linspace(0, 60, D_)),
    "singular": np.where(np.arange(D_) < D_ // 8, 1 / (1 + np.arange(D_)), 0),
    "rank one": np.where(np.arange(D_) == 0, 3.0, 0),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("spread", [1, 0.3, 0.01])
def test_the_distance_of_covariances_with_a_known_map(spectrum, spread):
    """If the map x -> M x with symmetric positive M carries one Gaussian to the other, it is the optimal transport and
    the distance is its cost: Tr((1 - M) C (1 - M)), free of roots. Neither matrix commutes with the other."""
    rng = np.random.default_rng(9)
    c1 = covariance(rng, SPECTRA[spectrum])
    m = covariance(rng, np.exp(spread * rng.standard_normal(D_)))
    c2 = m @ c1 @ m
    c2 = (c2 + c2.T) / 2
    rest = np.eye(D_) - m
    mu1, mu2 = rng.standard_normal((2, D_)) * 1e-3
    expected = np.trace(rest @ c1 @ rest) + np.sum((mu1 - mu2) ** 2)
    for distance in fid.frechet_distance(mu1, c1, mu2, c2), fid.frechet_distance(mu2, c2, mu1, c1):
        assert isinstance(distance, float) and distance == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_identical_inputs_are_at_distance_zero(spectrum):
    c = covariance(np.random.default_rng(10), SPECTRA[spectrum])
    assert abs(fid.frechet_distance(np.ones(D_), c, np.ones(D_), c)) < 1e-9 * np.trace(c)


def test_a_singular_against_a_regular_covariance():
    """They commute: the distance is the sum over eigenvalues of (sqrt(a) - sqrt(b))^2."""
    rng = np.random.default_rng(11)
    q = rotation(rng, D_)
    a, b = np.where(np.arange(D_) < 30, rng.random(D_), 0), rng.random(D_)
    expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    zero = np.zeros(D_)
    assert fid.frechet_distance(zero, q * a @ q.T, zero, q * b @ q.T) == pytest.approx(expected, rel=1e-6)
    a, b = np.where(np.arange(D_) < 100, a.clip(0.1) + 1, 0), np.where(np.arange(D_) > 80, b, 0)  # both singular
    expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    distance = fid.frechet_distance(zero, q * a @ q.T, zero, q * b @ q.T)
    assert distance == pytest.approx(expected, rel=1e-12)  # of eigenvalues of A^T C2 A, only 1e-9 is left
    b = rng.random(D_)
    assert fid.frechet_distance(zero, np.zeros((D_, D_)), zero, q * b @ q.T) == pytest.approx(b.sum())


def test_fewer_images_than_features_give_a_real_finite_distance():
    """Against 50 digits: of n images, the n x n products of their centered features have all the eigenvalues."""
    import mpmath  # which torch needs, by way of sympy

    rng = np.random.default_rng(12)
    x, y = rng.standard_normal((6, 40)), 0.5 * rng.standard_normal((5, 40)) + 0.2
    with mpmath.workdps(50):
        one, two = (mpmath.matrix(z.tolist()) for z in (x, y))
        means, centered = [], []
        for z in one, two:
            mean = [mpmath.fsum(z[i, j] for i in range(z.rows)) / z.rows for j in range(z.cols)]
            root = mpmath.sqrt(z.rows - 1)
            rest = mpmath.matrix([[(z[i, j] - mean[j]) / root for j in range(z.cols)] for i in range(z.rows)])
            means.append(mean)
            centered.append(rest)
        product = centered[0] * centered[1].T
        roots = mpmath.fsum(mpmath.sqrt(max(v, 0)) for v in mpmath.eigsy(product * product.T, eigvals_only=True))
        traces = [mpmath.fsum(v**2 for v in rest) for rest in centered]
        expected = float(mpmath.fsum((a - b) ** 2 for a, b in zip(*means)) + mpmath.fsum(traces) - 2 * roots)
    distance = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert distance == pytest.approx(expected, rel=1e-9)


def test_covariances_rounded_to_float32_have_a_distance():
    """Rounding gives a singular covariance eigenvalues of about -1e-7, at which Cholesky must stop in time."""
    rng = np.random.default_rng(13)
    c1 = covariance(rng, SPECTRA["singular"])
    m = covariance(rng, np.exp(0.3 * rng.standard_normal(D_)))
    c2 = m @ c1 @ m
    rest, zero = np.eye(D_) - m, np.zeros(D_)
    rounded = [c.astype(np.float32).astype(np.float64) for c in (c1, c2)]
    assert np.linalg.eigvalsh(rounded[0])[0] < -1e-9
    a = fid.root(rounded[0])
    assert np.abs(a @ a.T - c1).max() < 1e-6
    distance = fid.frechet_distance(zero, rounded[0], zero, rounded[1])
    assert distance == pytest.approx(np.trace(rest @ c1 @ rest), rel=1e-3)


def test_what_has_no_distance_is_refused():
    zero, eye = np.zeros(3), np.eye(3)
    assert "features of 3 and 2 numbers" in refusal(fid.frechet_distance, zero, eye, np.zeros(2), np.eye(2))
    assert "finite" in refusal(fid.frechet_distance, zero, eye * np.nan, zero, eye)
    for diagonal in (1, -1, 1), (-1, -1, -1):
        assert "negative eigenvalues" in refusal(fid.frechet_distance, zero, np.diag(diagonal), zero, eye)


def test_the_distance_is_faster_than_a_matrix_root():
    """At 2048 features the ratio is above 5; it grows with size, and is timed here where a test can afford it."""
    rng = np.random.default_rng(14)
    d, zero = 768, np.zeros(768)
    c1, c2 = (covariance(rng, np.exp(-8 * rng.random(d))) for _ in range(2))
    ours, root = [], []
    for _ in range(2):
        start = time.process_time()
        distance = fid.frechet_distance(zero, c1, zero, c2)
        middle = time.process_time()
        other = np.trace(c1) + np.trace(c2) - 2 * np.trace(scipy.linalg.sqrtm(c1 @ c2)).real
        ours.append(middle - start)
        root.append(time.process_time() - middle)
    assert distance == pytest.approx(other, rel=1e-6)
    assert min(root) > 2 * min(ours)


# ---- the command


def test_the_command_prints_a_line_that_says_what_the_number_is(network, weights, folders, tmp_path, capsys):
    reference, generated = (statistics_of(folder, network) for folder in folders)
    expected = fid.frechet_distance(reference.mu, reference.sigma, generated.mu, generated.sigma)
    saved = tmp_path / "new/reference.npz"
    assert run(*folders, "--weights", weights, "--save-stats", saved) == 0
    first, line = capsys.readouterr().out.strip().splitlines()
    assert first.startswith(f"{saved}: statistics of 3 of {folders[0]}")
    assert float(line.split()[1].rstrip(":")) == pytest.approx(expected, rel=1e-4)
    assert line.startswith("FID ") and "mode clean, network FID Inception" in line and "protocol none" in line
    assert f"reference 3 of {folders[0]}, generated 2 of {folders[1]}" in line
    assert expected > 0.1
    # the same, from the statistics; and against itself
    assert run(saved, folders[1], "--weights", weights, "--batch-size", "3") == 0
    again = capsys.readouterr().out.strip()
    assert float(again.split()[1].rstrip(":")) == pytest.approx(expected, rel=1e-4)
    assert "reference 3 of" in again
    assert run(saved, saved) == 0  # needs no network
    assert capsys.readouterr().out.startswith("FID 0.0000: mode clean, network FID Inception")
    # statistics of another mode are not compared with
    assert run(saved, folders[1], "--weights", weights, "--mode", "legacy") == 2
    assert "were not made alike" in capsys.readouterr().err


def test_a_protocol_sets_mode_and_crop(network, weights, folders, monkeypatch, capsys):
    # colors of places will do for features
    monkeypatch.setattr(fid.Inception, "forward", lambda self, x: F.adaptive_avg_pool2d(x, 27).flatten(1)[:, :2048])
    protocol = fid.PROTOCOLS["coco2017-5k"]
    reference, generated = (statistics_of(folder, network, "legacy", protocol.crop) for folder in folders)
    expected = fid.frechet_distance(reference.mu, reference.sigma, generated.mu, generated.sigma)
    assert run(*folders, "--weights", weights, "--protocol", "coco2017-5k") == 0
    out, err = capsys.readouterr()
    assert float(out.split()[1].rstrip(":")) == pytest.approx(expected, rel=1e-4)
    assert "mode legacy" in out and "protocol coco2017-5k" in out
    assert "notice: coco2017-5k means 5000 generated images" in err


def test_several_processes_find_what_one_finds(weights, folders, tmp_path, capsys):
    """Of 4 files, the first process reads one and finds one broken, the second reads two."""
    few = tmp_path / "few"
    few.mkdir()
    for i in (0, 1, 3):
        Image.new("RGB", (30, 30), (80 * i, 90, 200)).save(few / f"{i}.png")
    (few / "2.png").write_bytes(b"broken")
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    lines = []
    assert run(few, tmp_path / "other.npz", "--weights", weights, "--save-stats", tmp_path / "1.npz") == 0
    lines.append(capsys.readouterr().out.splitlines()[-1])
    done = command(few, tmp_path / "other.npz", "--weights", weights, "--save-stats", tmp_path / "2.npz", processes=2)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 2 and done.stderr.count("skipped, cannot be read: ") == 1
    lines.append(done.stdout.splitlines()[-1])
    one, two = (fid.load_statistics(tmp_path / f"{processes}.npz") for processes in (1, 2))
    np.testing.assert_allclose(two.mu, one.mu, rtol=1e-5, atol=1e-6 * np.abs(one.mu).max())
    np.testing.assert_allclose(two.sigma, one.sigma, rtol=1e-4, atol=1e-5 * np.abs(one.sigma).max())
    assert (two.count, two.name) == (one.count, one.name) == (3, one.name)
    numbers = [float(line.split()[1].rstrip(":")) for line in lines]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5)
    assert all("reference 3 of" in line and "generated an unknown number of" in line for line in lines)


def test_the_line_says_how_sample_py_made_the_images(folders, tmp_path):

    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "0.png", {"steps": "4", "guidance": "2.5", "seed": "7"})
    stats = fid.Statistics(np.zeros(1), np.eye(1), 1, "a network")
    assert fid.describe(tmp_path, stats) == f"1 of {tmp_path} (steps 4, guidance 2.5, seed 7)"
    assert fid.describe(folders[0], stats) == f"1 of {folders[0]}"
    assert fid.describe(Path("a.npz"), fid.Statistics(np.zeros(1), np.eye(1))) == (
        "an unknown number of a.npz (of another tool, mode and network unknown)"
    )


def test_wrong_arguments_are_one_clear_line_and_exit_code_2(folders, tmp_path, capsys):
    fid.Statistics(np.zeros(3), np.eye(3)).save(tmp_path / "three.npz")
    fid.Statistics(np.zeros(2), np.eye(2)).save(tmp_path / "two.npz")
    missing = ["--weights", tmp_path / "none.pth"]
    for arguments, message in [
        ([tmp_path / "three.npz", tmp_path / "two.npz"], "three.npz has 3 features an image, "),
        ([*folders, *missing], "is missing; get it from https://"),
        ([folders[0]], "give GENERATED to compare with"),
        ([*folders, "--save-stats", "stats"], "--save-stats FILE.npz"),
        ([tmp_path / "none.npz", folders[0]], "none.npz does not exist"),
        ([*folders, "--batch-size", 0], "--batch-size must be at least 1"),
        ([*folders, "--clip", MINIATURE_CLIP, "--mode", "clean"], "leave out --mode and --weights"),
    ]:
        assert run(*arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def test_clip_features_are_another_network(folders, tmp_path, capsys):
    clip = ClipScore.load(MINIATURE_CLIP)
    features = []
    for folder in folders:
        images = [Image.open(file).convert("RGB") for file in fid.find_images(folder)]
        features.append(clip.image_features(images).double().numpy())
    expected = fid.frechet_distance(*(f(x) for x in features for f in (lambda x: x.mean(0), lambda x: np.cov(x.T))))
    assert run(*folders, "--clip", MINIATURE_CLIP, "--save-stats", tmp_path / "clip.npz") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert float(line.split()[2].rstrip(":")) == pytest.approx(expected, rel=1e-4)
    assert line.startswith("Frechet distance ") and "network CLIP miniature-clip" in line and "mode of CLIP" in line
    fid.Statistics(np.zeros(3), np.eye(3)).save(tmp_path / "three.npz")
    assert run(tmp_path / "three.npz", folders[1], "--clip", MINIATURE_CLIP) == 2
    assert "three.npz has 3 features an image, this network 128" in capsys.readouterr().err
