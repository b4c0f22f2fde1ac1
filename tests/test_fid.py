"""FID: the network against an independent computation, preparation and distance against known answers, the command."""

import hashlib
import os
import subprocess
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ONE_THREAD, exit_code, refusal
from PIL import Image
from safetensors.torch import save_file

import fid
from evaluation import clip_fid
from evaluation.clip_score import ClipScore
from fid import Statistics
from support.images import find_images, save_png

CLIP = Path(fid.__file__).parent / "weights/miniature-clip"


# ---- the network


def places_that_exist(x):
    ones = torch.ones_like(x[:, :1])
    total, count = (F.conv2d(y.flatten(0, 1)[:, None], ones.new_ones(1, 1, 3, 3), padding=1) for y in (x, ones))
    return total.view_as(x) / count.view_as(ones)


def all_places(x):
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), x.new_ones(x.shape[1], 1, 3, 3) / 9, groups=x.shape[1])


def highest(x):
    return F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, 1)


SHRINKING = {
    "Conv2d_1a_3x3", "Mixed_6a.branch3x3", "Mixed_6a.branch3x3dbl_3", "Mixed_7a.branch3x3_2", "Mixed_7a.branch7x7x3_4"
}  # fmt: skip
CHAINS = {  # of each kind of block; what is in one word splits
    "5": ["1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3"],
    "6a": ["3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3"],
    "6": ["1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"],
    "7a": ["3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"],
    "7": ["1x1", "3x3_1 3x3_2a+3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a+3x3dbl_3b"],
}


def reference(state, images, average=places_that_exist):
    """Features from the figures of Szegedy et al. 2015, in float64, with batch norm as its formula."""

    def conv(x, name):
        keys = [f"{name}.{k}" for k in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")]
        weight, scale, shift, mean, var = (state[key].double() for key in keys)
        bare = name in SHRINKING | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}
        padding = 0 if bare else tuple((n - 1) // 2 for n in weight.shape[2:])
        y = F.conv2d(x, weight, stride=2 if name in SHRINKING else 1, padding=padding)
        y = (y - mean[:, None, None]) / (var[:, None, None] + 0.001) ** 0.5
        return (y * scale[:, None, None] + shift[:, None, None]).clamp(min=0)

    x = conv(2 * images.double() - 1, "Conv2d_1a_3x3")
    x = F.max_pool2d(conv(conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3"), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    for block in "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split():
        outputs = []
        for chain in CHAINS.get(block, CHAINS.get(block[0])):
            y = x
            for step in chain.split():
                y = torch.cat([conv(y, f"Mixed_{block}.branch{part}") for part in step.split("+")], 1)
            outputs.append(y)
        if block in ("6a", "7a"):
            outputs.append(F.max_pool2d(x, 3, 2))
        else:
            outputs.append(conv((highest if block == "7c" else average)(x), f"Mixed_{block}.branch_pool"))
        x = torch.cat(outputs, 1)
    return x.flatten(2).mean(2)


def test_the_network_computes_what_the_reference_computes(inception):
    images = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(2))
    images[1, :, 100:] = images[1, :, 100:101]  # another texture
    state = inception.state_dict()
    features, expected = inception(images), reference(state, images)
    assert features.shape == (2, 2048)
    assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().mean() > 0.01  # a reference that says something
    assert (features - expected).abs().max() / expected.abs().max() < 1e-4
    ordinary = reference(state, images, all_places)  # the pools of the usual Inception would be seen
    assert (features - ordinary).abs().max() / expected.abs().max() > 1e-2


def test_names_and_shapes_are_those_of_the_published_file():
    """The digest is that of pytorch-fid's network, whose state dict the published file is."""
    shapes = sorted((name, tuple(w.shape)) for name, w in fid.Inception().state_dict().items())
    assert hashlib.sha256(repr(shapes).encode()).hexdigest()[:16] == "d1c9a52dc8072dcb"


def test_a_safetensors_copy_loads_the_same(inception, inception_file, tmp_path):
    state = {name: w for name, w in inception.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "inception.safetensors")
    for file in inception_file, tmp_path / "inception.safetensors":
        loaded = fid.Inception().load(file)
        assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in state.items())
        assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_another_or_a_damaged_or_a_harmful_file_is_refused(inception, inception_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def message(content):
        file = Path("w.pth")
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        told = refusal(fid.Inception().load, file)
        assert told.startswith("w.pth is damaged or not the FID network (") and fid.PUBLISHED in told
        return told

    state = dict(inception.state_dict())
    ordinary = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    assert "size mismatch for fc.weight" in message(state | ordinary)
    assert 'Unexpected key(s) in state_dict: "AuxLogits"' in message(state | {"AuxLogits": torch.zeros(8)})
    assert 'Missing key(s) in state_dict: "fc.bias"' in message({k: w for k, w in state.items() if k != "fc.bias"})
    assert "fc.bias is torch.float16" in message(state | {"fc.bias": torch.zeros(1008).half()})
    for content in inception_file.read_bytes()[: 2**20], b"", {"model": state}, [1]:
        message(content)
    for content in b"<html>", {"fc.weight": Harmful()}:
        assert "no plain file of tensors" in message(content)
    assert not Path("harm").exists()
    assert "none.pth is missing; get https" in refusal(fid.Inception().load, tmp_path / "none.pth")


# ---- what it is shown


def bilinear(samples, size):
    """Rows of samples -> `size` of them, each between its two nearest, however many are left out."""
    place = ((np.arange(size) + 0.5) * len(samples) / size - 0.5).clip(0, len(samples) - 1)
    low = np.floor(place).astype(int)
    high = (low + 1).clip(max=len(samples) - 1)
    part = (place - low)[:, None, None]
    return samples[low] * (1 - part) + samples[high] * part


@pytest.mark.parametrize("height, width", [(40, 410), (512, 64)])
def test_legacy_has_a_known_answer(height, width):
    pixels = np.random.default_rng(4).choice([0, 255, 77], (height, width, 3)).astype(np.uint8)
    expected = bilinear(bilinear(pixels.astype(float), 299).transpose(1, 0, 2), 299).transpose(2, 1, 0) / 255
    np.testing.assert_allclose(
        fid.legacy(Image.fromarray(pixels)), expected, atol=1e-4
    )  # a fortieth of a level of grey


def clean_by_pillow(pixels):
    """What clean-fid 0.1.35 computes, from Pillow alone: (3, 299, 299), 0..255."""
    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    return np.stack([channel.resize((299, 299), Image.BICUBIC) for channel in channels]).clip(0, 255)


@pytest.mark.parametrize("size", [256, 512])
def test_clean_is_bit_by_bit_that_of_clean_fid(size):
    rng = np.random.default_rng(5)
    sharp = np.kron(rng.choice([0, 255], (16, 16, 3)), np.ones((size // 16, size // 16, 1))).astype(np.uint8)
    soft = np.asarray(Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size)))
    for pixels in sharp, soft:
        shown = fid.clean(Image.fromarray(pixels))
        assert shown.dtype == torch.float32
        np.testing.assert_array_equal(shown.numpy() * 256, clean_by_pillow(pixels))
    assert clean_by_pillow(sharp).min() == 0 and (clean_by_pillow(sharp) == 255).any()  # so it was clipped


class Stop(Exception):
    pass


def test_the_network_sees_minus_one_to_one_in_full_precision(inception, monkeypatch):
    """Legacy: 0..255 is -1..1. Clean: (x - 128) / 128."""
    seen = []

    def look(x):
        seen.append((float(x.mean()), torch.backends.cudnn.allow_tf32))
        raise Stop

    monkeypatch.setattr(inception.Conv2d_1a_3x3, "forward", look)
    for mode in "legacy", "clean":
        for level in 0, 128, 255:
            with pytest.raises(Stop):
                inception(fid.MODES[mode](Image.new("RGB", (50, 60), (level,) * 3))[None])
    values, tf32 = zip(*seen)
    assert values == pytest.approx([-1, 1 / 255, 1, -1, 0, 127 / 128], abs=1e-6)
    assert not any(tf32)
    assert "(B, 3, 299, 299)" in refusal(inception, torch.zeros(1, 3, 256, 256))


def test_protocols_crop_and_resize_as_written():
    wide = Image.fromarray(np.random.default_rng(6).integers(0, 256, (301, 640, 3), dtype=np.uint8))
    lanczos = Image.Resampling.LANCZOS
    square = wide.crop((170, 0, 471, 301))  # (640 - 301) / 2 = 169.5, to the even number
    for name, size in ("coco2014-30k", 256), ("coco2014-10k", 512):
        np.testing.assert_array_equal(fid.PROTOCOLS[name].crop(wide), square.resize((size, size), lanczos))
    scaled = wide.resize((1088, 512), lanczos)  # 640 x 512 / 301 = 1088.6
    np.testing.assert_array_equal(fid.PROTOCOLS["coco2017-5k"].crop(wide), scaled.crop((288, 0, 800, 512)))
    assert fid.PROTOCOLS["coco2017-5k"].crop(wide.transpose(Image.Transpose.ROTATE_90)).size == (512, 512)
    made = scaled.crop((0, 0, 512, 512))
    np.testing.assert_array_equal(fid.PROTOCOLS["coco2017-5k"].crop(made), made)  # generated ones stay as they are


# ---- statistics


def corner(to_input=fid.legacy):
    """A network whose features are the color of the first pixel."""
    return fid.Network("", 3, to_input, lambda inputs: inputs[:, :, 0, 0])


def statistics_of(folder, network, batch_size=4, workers=0):
    return fid.statistics(folder, network, None, batch_size, workers)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sets of small images of mixed sizes, with a folder inside a folder."""
    rng, made = np.random.default_rng(0), []
    for name, count, level in ("reference", 3, 256), ("generated", 2, 160):
        folder = tmp_path_factory.mktemp(name)
        (folder / "more/still more").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, level, (6 + i, 9, 3), dtype=np.uint8)
            place = folder / "more/still more" if i % 2 else folder
            Image.fromarray(pixels).resize((40 + 10 * i, 64), Image.Resampling.BICUBIC).save(place / f"{i}.png")
        made.append(folder)
    return made


@pytest.mark.parametrize("batch_size, workers", [(2, 0), (3, 2), (1, 4)])
def test_statistics_are_mean_and_covariance_of_all_features(folders, batch_size, workers):
    """Of images of many sizes; features with a mean much larger than their spread."""

    def features(inputs):
        return inputs.flatten(2).mean(2) + inputs.flatten(2)[..., 0] + 30  # (B, 3)

    images = [Image.open(file).convert("RGB") for file in find_images(folders[0])]
    x = np.concatenate([features(fid.legacy(image)[None]).double() for image in images])
    stats = statistics_of(folders[0], fid.Network("", 3, fid.legacy, features), batch_size, workers)
    np.testing.assert_allclose(stats.mu, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.sigma, np.cov(x.T), rtol=1e-4, atol=1e-7)
    assert stats.count == 3


def test_transparency_is_dropped_and_no_exif_rotation_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (60, 30), (0, 50, 100))
    wide.save(tmp_path / "0.jpg", exif=exif, quality=95)
    Image.new("RGBA", (60, 30), (0, 50, 100, 0)).save(tmp_path / "1.png")
    shapes = []
    network = corner(lambda image: shapes.append(image.size) or fid.legacy(image))
    np.testing.assert_allclose(statistics_of(tmp_path, network).mu * 255, [0, 50, 100], atol=1.5)
    assert shapes == [(60, 30)] * 2


def test_statistics_files_are_those_of_the_common_tools(tmp_path):
    stats = Statistics(np.arange(3.0), np.eye(3), 7, "a name")
    stats.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as content:
        np.testing.assert_array_equal(content["mu"], stats.mu)
        np.testing.assert_array_equal(content["sigma"], stats.sigma)
    again = Statistics.load(tmp_path / "ours.npz")
    assert (again.count, again.name) == (7, "a name") and np.array_equal(again.sigma, stats.sigma)
    np.savez_compressed(tmp_path / "theirs.npz", mu=stats.mu.astype(np.float32), sigma=stats.sigma)
    theirs = Statistics.load(tmp_path / "theirs.npz")
    assert theirs.count is None and theirs.name == "" and theirs.mu.dtype == np.float64
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours.npz", "theirs.npz"]


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"mean": np.eye(3)}, "mu"),
        ({"mu": np.zeros(4), "sigma": np.eye(3)}, "should be a mean (D,) and a covariance (D, D)"),
        ({"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)}, "finite and symmetric"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "finite and symmetric"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(3)}, "allow_pickle"),  # would have to be unpickled
        (None, ""),  # cut short
    ],
)
def test_bad_statistics_files_are_refused(tmp_path, content, reason):
    file = tmp_path / "s.npz"
    np.savez(file, **content or {"mu": np.zeros(3), "sigma": np.eye(3)})
    if content is None:
        file.write_bytes(file.read_bytes()[:300])
    message = refusal(Statistics.load, file)
    assert message.startswith(f"{file} does not hold mu and sigma: ") and reason in message


@pytest.mark.parametrize("good, bad, fits", [(5, 1, 1), (5, 2, 0), (199, 2, 1), (199, 3, 0), (1, 1, 0)])
def test_an_unreadable_image_is_left_out_counted_and_named(tmp_path, capsys, good, bad, fits):
    for i in range(good):
        Image.new("RGB", (9, 9), (i % 256, 2 * i % 256, i * i % 256)).save(tmp_path / f"{i:03d}.png")
    for i in range(bad):  # the first of all
        (tmp_path / f"-bad{i}.png").write_bytes((tmp_path / "000.png").read_bytes()[: 37 + i])
    if fits:
        stats = statistics_of(tmp_path, corner())
        pixels = np.array([(i % 256, 2 * i % 256, i * i % 256) for i in range(good)]) / 255
        np.testing.assert_allclose(stats.mu, pixels.mean(0), rtol=1e-6)
        assert stats.count == good
    else:
        message = refusal(statistics_of, tmp_path, corner())
        assert (f"{bad} of {good + bad} images cannot be used" if good > 1 else "a covariance needs 2") in message
    told = capsys.readouterr().err
    assert all(f"notice: {tmp_path}/-bad{i}.png is left out: " in told for i in range(bad))


def test_features_that_are_not_finite_and_too_little_memory_are_one_line(folders, monkeypatch, capsys):
    network = corner()
    network.features = lambda inputs: inputs[:, :, 0, 0] / 0
    assert "not finite" in refusal(statistics_of, folders[0], network)

    def full(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    network.features = full
    monkeypatch.setattr(fid, "inception_network", lambda *args: network)
    assert run(*folders) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--batch-size" in error and error.startswith("error: out of memory (CUDA out of memory. Tried")


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
    "beyond float64": np.exp(-np.linspace(0, 60, D_)),
    "singular": np.where(np.arange(D_) < D_ // 8, 1 / (1 + np.arange(D_)), 0),
    "rank one": np.where(np.arange(D_) == 0, 3.0, 0),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("spread", [1, 0.01])
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
    assert abs(fid.frechet_distance(mu1, c1, mu1, c1)) < 1e-9 * np.trace(c1)


def test_singular_covariances_that_commute():
    """The distance is the sum over eigenvalues of (sqrt(a) - sqrt(b))^2."""
    rng = np.random.default_rng(11)
    q, zero = rotation(rng, D_), np.zeros(D_)
    regular, first, last = rng.random((3, D_)) + [[0], [1], [0]]
    first[100:], last[:80] = 0, 0
    for a, b in (first, regular), (first, last), (zero, regular):
        expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
        assert fid.frechet_distance(zero, q * a @ q.T, zero, q * b @ q.T) == pytest.approx(expected, rel=1e-6)


def of_few_images(x, y):
    """The distance of features (N, D) of fewer images than features: their centered N x N products hold all of it."""
    x0, y0 = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    cross = np.linalg.svd(x0 @ y0.T, compute_uv=False).sum()
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(x0**2) + np.sum(y0**2) - 2 * cross


def test_fewer_images_than_features_give_a_real_finite_distance():
    rng = np.random.default_rng(12)
    x, y = rng.standard_normal((6, 40)), 0.5 * rng.standard_normal((5, 40)) + 0.2
    distance = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert distance == pytest.approx(of_few_images(x, y), rel=1e-9)


def test_covariances_rounded_to_float32_have_a_distance():
    """Rounding gives a singular covariance eigenvalues of about -1e-7, at which Cholesky must stop in time."""
    rng = np.random.default_rng(13)
    c1 = covariance(rng, SPECTRA["singular"])
    m = covariance(rng, np.exp(0.3 * rng.standard_normal(D_)))
    rest, zero = np.eye(D_) - m, np.zeros(D_)
    rounded = [c.astype(np.float32).astype(np.float64) for c in (c1, m @ c1 @ m)]
    assert np.linalg.eigvalsh(rounded[0])[0] < -1e-9
    distance = fid.frechet_distance(zero, rounded[0], zero, rounded[1])
    assert distance == pytest.approx(np.trace(rest @ c1 @ rest), rel=1e-3)


def test_what_has_no_distance_is_refused():
    zero, eye = np.zeros(3), np.eye(3)
    assert "finite" in refusal(fid.frechet_distance, zero, eye * np.nan, zero, eye)
    for diagonal in (1, -1, 1), (-1, -1, -1):
        assert "negative eigenvalues" in refusal(fid.frechet_distance, zero, np.diag(diagonal), zero, eye)


# ---- the command


def run(*arguments, module=fid):
    return exit_code(module, *arguments, "--device", "cpu")


def number(line):
    return float(line.partition(":")[0].split()[-1])


@pytest.mark.parametrize(
    "how, mode",
    [(["--mode", "clean"], "clean"), (["--mode", "legacy"], "legacy"), (["--protocol", "coco2017-5k"], "legacy")],
)
def test_the_command_gives_the_number_of_an_independent_computation(
    inception, inception_file, folders, capsys, how, mode
):
    """Pillow's resize or PyTorch's, the network from the figures, the distance from the features."""
    features = []
    for folder in folders:
        images = [Image.open(file).convert("RGB") for file in find_images(folder)]
        if "--protocol" in how:
            images = [fid.PROTOCOLS[how[1]].crop(image) for image in images]
        if mode == "clean":
            shown = [torch.from_numpy(clean_by_pillow(np.array(image))) / 256 for image in images]
        else:
            tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in images]
            shown = [F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)[0] for x in tensors]
        features.append(reference(inception.state_dict(), torch.stack(shown)).numpy())
    assert run(*folders, "--weights", inception_file, *how) == 0
    out, err = capsys.readouterr()
    assert number(out) == pytest.approx(of_few_images(*features), rel=1e-4)
    assert f"mode {mode}, network FID Inception" in out
    assert ("notice: coco2017-5k means 5000 generated images" in err) == ("--protocol" in how)


def test_the_command_prints_a_line_that_says_what_the_number_is(inception_file, folders, tmp_path, capsys):
    saved = tmp_path / "new/reference.npz"
    assert run(*folders, "--weights", inception_file, "--save-stats", saved) == 0
    first, line = capsys.readouterr().out.strip().splitlines()
    assert first.startswith(f"{saved}: statistics of 3 of {folders[0]}")
    assert line.startswith("FID ") and "mode clean, network FID Inception" in line and "protocol none" in line
    assert f"reference 3 of {folders[0]}, generated 2 of {folders[1]}" in line and number(line) > 0.1
    # the same, from the statistics; and against itself
    assert run(saved, folders[1], "--weights", inception_file, "--batch-size", "3") == 0
    again = capsys.readouterr().out.strip()
    assert number(again) == pytest.approx(number(line), rel=1e-4) and "reference 3 of" in again
    assert run(saved, saved) == 0  # needs no network
    assert capsys.readouterr().out.startswith("FID 0.0000: mode clean, network FID Inception")
    # statistics of another mode are not compared with
    assert run(saved, folders[1], "--weights", inception_file, "--mode", "legacy") == 2
    assert "were not made alike" in capsys.readouterr().err


def test_several_processes_find_what_one_finds(inception_file, tmp_path, capsys):
    """Of 4 files, the first process reads one and finds one broken, the second reads two."""
    few = tmp_path / "few"
    few.mkdir()
    for i in (0, 1, 3):
        Image.new("RGB", (30, 30), (80 * i, 90, 200)).save(few / f"{i}.png")
    (few / "2.png").write_bytes(b"broken")
    Statistics(np.zeros(2048), np.eye(2048)).save(tmp_path / "other.npz")
    arguments = [few, tmp_path / "other.npz", "--weights", inception_file, "--save-stats"]
    assert run(*arguments, tmp_path / "1.npz") == 0
    lines = [capsys.readouterr().out.splitlines()[-1]]
    line = helpers.command(fid, *arguments, tmp_path / "2.npz", "--device", "cpu", processes=2)
    done = subprocess.run(line, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 2 and done.stderr.count("2.png is left out: ") == 1
    lines.append(done.stdout.splitlines()[-1])
    one, two = (Statistics.load(tmp_path / f"{processes}.npz") for processes in (1, 2))
    np.testing.assert_allclose(two.mu, one.mu, rtol=1e-5, atol=1e-6 * np.abs(one.mu).max())
    np.testing.assert_allclose(two.sigma, one.sigma, rtol=1e-4, atol=1e-5 * np.abs(one.sigma).max())
    assert (two.count, two.name) == (one.count, one.name) == (3, one.name)
    assert number(lines[1]) == pytest.approx(number(lines[0]), rel=1e-5)
    assert all("reference 3 of" in line and "generated an unknown number of" in line for line in lines)


OURS = {"software": "proreflow", "seed": "7", "steps": "4", "guidance": "2.5", "weights": "abc"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ([{}, {}], ""),
        ([{"seed": "8"}, {}], "holds images of several runs (seed 7 and 8)"),
        ([{"steps": "2", "weights": "x"}, {"steps": "8"}], "(steps 4 and 2 and 8, weights abc and x)"),
        ([None], "1 of 4 images are not of sample.py like the others ("),
        ([None, None], "2 of 5 images are not of sample.py like the others ("),
    ],
)
def test_images_of_other_runs_are_not_scored(folders, tmp_path, monkeypatch, capsys, settings, message):
    for i, changed in enumerate([{}, {}, {}, *settings]):
        own = OURS | changed | {"prompt": f"prompt {i}", "index": str(i)} if changed is not None else {"prompt": "no"}
        save_png(np.full((8, 8, 3), 9 * i, np.uint8), tmp_path / f"{i}.png", own)
    monkeypatch.setattr(fid, "inception_network", lambda *args: corner())
    refused = bool(message) and settings != [None]
    assert run(folders[0], tmp_path) == (2 if refused else 0)
    out, err = capsys.readouterr()
    assert message in err and (refused or f"of {tmp_path} (steps 4, guidance 2.5, seed 7)" in out)


def test_wrong_arguments_are_one_clear_line_and_exit_code_2(folders, tmp_path, capsys):
    Statistics(np.zeros(3), np.eye(3)).save(tmp_path / "three.npz")
    Statistics(np.zeros(2), np.eye(2)).save(tmp_path / "two.npz")
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ([tmp_path / "three.npz", tmp_path / "two.npz"], "three.npz has 3 features an image, "),
        ([*folders, "--weights", tmp_path / "none.pth"], "none.pth is missing; get https://"),
        ([folders[0]], "give GENERATED to compare with"),
        ([*folders, "--save-stats", "stats"], "--save-stats FILE.npz"),
        ([tmp_path / "none.npz", folders[0]], "none.npz does not hold mu and sigma"),
        ([tmp_path / "none", folders[0]], "none is no folder"),
        ([folders[0], tmp_path / "empty"], "empty holds no images"),
        ([*folders, "--batch-size", 0], "--batch-size: must be"),
    ]:
        assert run(*arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def test_clip_features_are_another_network(folders, tmp_path, capsys):
    clip, features = ClipScore.load(CLIP), []
    for folder in folders:
        images = [Image.open(file).convert("RGB") for file in find_images(folder)]
        features.append(clip.image_features(images).double().numpy())
    assert run(*folders, "--clip", CLIP, "--save-stats", tmp_path / "clip.npz", module=clip_fid) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert number(line) == pytest.approx(of_few_images(*features), rel=1e-4)
    assert line.startswith("Frechet distance ") and "network CLIP miniature-clip" in line and "mode of CLIP" in line
    Statistics(np.zeros(3), np.eye(3)).save(tmp_path / "three.npz")
    assert run(tmp_path / "three.npz", folders[1], "--clip", CLIP, module=clip_fid) == 2
    assert "three.npz has 3 features an image, this network 128" in capsys.readouterr().err
