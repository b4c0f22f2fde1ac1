"""FID: the network against an independent computation, preparation and distance against known answers, the command."""

import hashlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, exit_code, refusal, same
from PIL import Image

import fid
from evaluation import clip_fid
from evaluation.clip_score import ClipScore
from fid import Statistics
from support.images import find_images, read_image, save_png
from support.scoring import check_left_out

CLIP = ROOT / "weights/miniature-clip"


# ---- the network


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


def reference(state, images):
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
            pooled = F.max_pool2d(x, 3, 1, 1) if block == "7c" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            outputs.append(conv(pooled, f"Mixed_{block}.branch_pool"))
        x = torch.cat(outputs, 1)
    return x.flatten(2).mean(2)


def test_the_network_computes_in_full_precision_what_the_reference_computes(inception):
    images = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(2))
    images[1, :, 100:] = images[1, :, 100:101]  # another texture
    tf32 = []
    hook = inception.Conv2d_1a_3x3.register_forward_pre_hook(lambda *_: tf32.append(torch.backends.cudnn.allow_tf32))
    features, expected = inception(images), reference(inception.state_dict(), images)
    hook.remove()
    assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().mean() > 0.01  # a reference that says something
    assert (features - expected).abs().max() / expected.abs().max() < 1e-4 and features.shape == (2, 2048)
    assert tf32 == [False]


def test_names_and_shapes_are_those_of_the_published_file():
    """The digest is that of pytorch-fid's network, whose state dict the published file is."""
    shapes = sorted((name, tuple(w.shape)) for name, w in fid.Inception().state_dict().items())
    assert hashlib.sha256(repr(shapes).encode()).hexdigest()[:16] == "d1c9a52dc8072dcb"


def test_the_published_file_loads(inception, inception_file):
    assert same(fid.Inception().load(inception_file).state_dict(), inception.state_dict())


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def test_a_damaged_or_harmful_file_or_that_of_another_network_is_refused(inception, inception_file, tmp_path, capsys):
    file, network = tmp_path / "w.pth", fid.Inception()
    ordinary = inception.state_dict() | {"fc.weight": torch.zeros(1000, 2048), "AuxLogits": torch.zeros(8)}
    del ordinary["fc.bias"]
    for content, reason in (
        (ordinary, 'Missing key(s) in state_dict: "fc.bias". Unexpected key(s) in state_dict: "AuxLogits"'),
        ({"fc.bias": torch.zeros(1008).half()}, "fc.bias is torch.float16"),
        ({"model": {}}, ""),
        (inception_file.read_bytes()[: 2**20], ""),
        (b"<html>", "no plain file of tensors"),
        ({"fc.weight": Harmful()}, "no plain file of tensors"),
    ):
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        said = refusal(network.load, file)
        assert said.startswith(f"{file} is damaged or not the FID network (") and fid.PUBLISHED in said
        assert reason in said
    assert "harm" not in capsys.readouterr().out
    assert "none.pth is missing; get https" in refusal(network.load, tmp_path / "none.pth")


# ---- what it is shown


def test_legacy_is_bilinear_and_leaves_out_what_lies_between():
    """Half of 598 rows: each new one between two. A quarter of 1196 columns: between the inner two of four."""
    pixels = np.random.default_rng(4).choice([0, 255, 77], (598, 1196, 3)).astype(np.uint8)
    columns = (pixels[:, 1::4] / 2 + pixels[:, 2::4] / 2).transpose(2, 0, 1)
    expected = (columns[:, ::2] + columns[:, 1::2]) / 2 / 255
    np.testing.assert_allclose(fid.legacy(Image.fromarray(pixels)), expected, atol=1e-5)


@pytest.mark.parametrize("size", [256, 512])
def test_clean_is_bit_by_bit_that_of_clean_fid(size):
    """Its version 0.1.35, from Pillow alone."""
    sharp = np.random.default_rng(5).choice([0, 255], (16, 16, 3))
    pixels = np.kron(sharp, np.ones((size // 16, size // 16, 1))).astype(np.uint8)
    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    resized = np.stack([channel.resize((299, 299), Image.BICUBIC) for channel in channels])
    assert resized.min() < 0 and resized.max() > 255  # so that it has to be clipped
    np.testing.assert_array_equal(fid.clean(Image.fromarray(pixels)).numpy() * 256, resized.clip(0, 255))


def test_protocols_crop_and_resize_as_written():
    wide = Image.fromarray(np.random.default_rng(6).integers(0, 256, (301, 640, 3), dtype=np.uint8))
    lanczos = Image.Resampling.LANCZOS
    square = wide.crop((170, 0, 471, 301))  # (640 - 301) / 2 = 169.5, to the even number
    for name, size in ("coco2014-30k", 256), ("coco2014-10k", 512):
        np.testing.assert_array_equal(fid.PROTOCOLS[name].crop(wide), square.resize((size, size), lanczos))
    scaled = wide.resize((1088, 512), lanczos)  # 640 x 512 / 301 = 1088.6
    np.testing.assert_array_equal(fid.PROTOCOLS["coco2017-5k"].crop(wide), scaled.crop((288, 0, 800, 512)))
    made = scaled.crop((0, 0, 512, 512))
    np.testing.assert_array_equal(fid.PROTOCOLS["coco2017-5k"].crop(made), made)  # generated ones stay as they are


# ---- statistics


def corner(mode="legacy"):
    """A network whose features are the color of the first pixel, and much larger than they are different."""
    return fid.Network(f"mode {mode}, network corner", 3, fid.MODES[mode], lambda inputs: inputs[:, :, 0, 0] + 300)


def statistics_of(folder, network):
    return fid.statistics(folder, network, None, batch_size=4, workers=0)


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


def test_statistics_files_are_those_of_the_common_tools(tmp_path):
    stats = Statistics(np.arange(3.0), np.eye(3), 7, "a name")
    stats.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as content:
        assert np.array_equal(content["mu"], stats.mu) and np.array_equal(content["sigma"], stats.sigma)
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
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "finite and symmetric"),
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


def test_images_are_opaque_not_rotated_and_an_unreadable_one_is_left_out_counted_and_named(tmp_path, capsys):
    files, exif = [tmp_path / f"{i}.png" for i in range(5)], Image.Exif()
    exif[0x0112] = 6  # would be turned to the right
    for i, file in enumerate(files):
        image = Image.new("RGBA", (9, 6))
        image.putpixel((0, 0), (i, 2 * i, i * i, 0))
        image.save(file, exif=exif)
    (tmp_path / "-bad.png").write_bytes(files[0].read_bytes()[:37])  # the first of all
    stats = statistics_of(tmp_path, corner())
    np.testing.assert_allclose((stats.mu - 300) * 255, [2, 4, 6], atol=0.01)
    assert stats.count == 5 and f"notice: {tmp_path}/-bad.png is left out: " in capsys.readouterr().err
    for file in files[1:]:
        file.unlink()
    assert "a covariance needs 2" in refusal(statistics_of, tmp_path, corner())


def test_one_image_in_a_hundred_may_be_left_out(tmp_path, capsys):
    check_left_out(2, 200, tmp_path)
    assert "2 of 200 images cannot be used" in capsys.readouterr().err
    assert "3 of 200 images cannot be used" in refusal(check_left_out, 3, 200, tmp_path)


def test_features_that_are_not_finite_and_too_little_memory_are_one_line(folders, monkeypatch, capsys):
    network = corner()
    network.features = lambda inputs: inputs[:, :, 0, 0] / 0
    assert "not finite" in refusal(statistics_of, folders[0], network)

    network.features = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    monkeypatch.setattr(fid, "inception_network", lambda *args: network)
    assert run(*folders) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--batch-size" in error and error.startswith("error: out of memory (CUDA out of memory. Tried")


# ---- the distance


def covariance(rng, spectrum):
    """A random symmetric matrix with these eigenvalues."""
    q = np.linalg.qr(rng.standard_normal((D_, D_)))[0]
    c = q * spectrum @ q.T
    return (c + c.T) / 2


D_ = 160
SPECTRA = {
    "flat": np.ones(D_),
    "beyond float64": np.exp(-np.linspace(0, 60, D_)),
    "singular": np.where(np.arange(D_) < D_ // 8, 1 / (1 + np.arange(D_)), 0),
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
    if spectrum == "singular" and spread == 1:  # rounding makes eigenvalues of -1e-7, at which Cholesky must stop
        rounded = fid.frechet_distance(mu1, c1.astype(np.float32), mu2, c2.astype(np.float32))
        assert rounded == pytest.approx(expected, rel=1e-3)


def of_few_images(x, y):
    """The distance of features (N, D) of fewer images than features: their centered N x N products hold all of it."""
    x0, y0 = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    cross = np.linalg.svd(x0 @ y0.T, compute_uv=False).sum()
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(x0**2) + np.sum(y0**2) - 2 * cross


def test_fewer_images_than_features_give_a_real_finite_distance():
    rng = np.random.default_rng(12)
    x = rng.standard_normal((6, 40))
    for y in 0.5 * rng.standard_normal((5, 40)) + 0.2, np.ones((2, 40)):  # the latter: one image twice
        distance = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        assert distance == pytest.approx(of_few_images(x, y), rel=1e-9)


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


@pytest.fixture
def corners(monkeypatch):
    monkeypatch.setattr(fid, "inception_network", lambda weights, mode, device: corner(mode))


def test_the_command_prints_a_line_that_says_what_the_number_is(corners, folders, tmp_path, capsys):
    features, saved, how = [], tmp_path / "new/reference.npz", ("--protocol", "coco2017-5k")
    for folder in folders:
        images = [fid.legacy(fid.resize_then_crop(read_image(file), 512)) for file in find_images(folder)]
        features.append((torch.stack(images)[:, :, 0, 0] + 300).double().numpy())
    assert run(*folders, *how, "--save-stats", saved, "--batch-size", 2) == 0
    out, err = capsys.readouterr()
    first, line = out.splitlines()
    assert first.startswith(f"{saved}: statistics of 3 of {folders[0]}")
    assert line.startswith("FID ") and ": mode legacy, network corner, protocol coco2017-5k; " in line
    assert number(line) == pytest.approx(of_few_images(*features), abs=1e-4)
    assert f"reference 3 of {folders[0]}, generated 2 of {folders[1]}" in line
    assert "notice: coco2017-5k means 5000 generated images" in err
    # the same, from the statistics; and against itself
    assert run(saved, folders[1], *how, "--workers", 0) == 0
    assert number(capsys.readouterr().out) == number(line)
    assert run(saved, saved) == 0
    assert capsys.readouterr().out.startswith("FID 0.0000: mode legacy, network corner")
    # statistics of another mode are not compared with; those of another tool may be alike
    assert run(saved, folders[1], *how, "--mode", "clean") == 2
    assert "were not made alike" in capsys.readouterr().err
    Statistics(np.zeros(3), np.eye(3)).save(tmp_path / "other.npz")
    assert run(tmp_path / "other.npz", folders[1]) == 0
    assert "reference an unknown number of" in capsys.readouterr().out


OURS = {"software": "proreflow", "seed": "7", "steps": "4", "guidance": "2.5", "weights": "abc"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ([{}, {}], ""),
        ([{"steps": "2", "weights": "x"}, {"steps": "8"}], "several runs (steps 4 and 2 and 8, weights abc and x)"),
        ([None], "1 of 4 images are not of sample.py like the others ("),
        ([None, None], "2 of 5 images are not of sample.py like the others ("),
    ],
)
def test_images_of_other_runs_are_not_scored(corners, folders, tmp_path, capsys, settings, message):
    for i, changed in enumerate([{}, {}, {}, *settings]):
        own = OURS | changed | {"prompt": f"prompt {i}", "index": str(i)} if changed is not None else {"prompt": "no"}
        save_png(np.full((8, 8, 3), 9 * i, np.uint8), tmp_path / f"{i}.png", own)
    refused = bool(message) and settings != [None]
    assert run(folders[0], tmp_path) == (2 if refused else 0)
    out, err = capsys.readouterr()
    assert message in err and (refused or f"of {tmp_path} (steps 4, guidance 2.5, seed 7)" in out)


def test_wrong_arguments_are_one_clear_line_and_exit_code_2(folders, tmp_path, capsys):
    Statistics(np.zeros(3), np.eye(3)).save(tmp_path / "three.npz")
    Statistics(np.zeros(2), np.eye(2)).save(tmp_path / "two.npz")
    for arguments, message in [
        ([tmp_path / "three.npz", tmp_path / "two.npz"], "three.npz has 3 features an image, "),
        ([folders[0]], "give GENERATED to compare with"),
        ([*folders, "--save-stats", "stats"], "--save-stats FILE.npz"),
    ]:
        assert run(*arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def test_clip_features_are_another_network(folders, capsys):
    clip, features = ClipScore.load(CLIP), []
    for folder in folders:
        features.append(clip.image_features([read_image(file) for file in find_images(folder)]).double().numpy())
    assert run(*folders, "--clip", CLIP, module=clip_fid) == 0
    line = capsys.readouterr().out
    assert number(line) == pytest.approx(of_few_images(*features), rel=1e-4)
    assert line.startswith("Frechet distance ") and "network CLIP miniature-clip" in line and "mode of CLIP" in line
