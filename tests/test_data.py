"""Which images training sees, and with which draws: a matter of seed and number alone."""

import sys

import numpy as np
import pytest
import torch
from helpers import exit_code, refusal, rewrite, write_shard
from PIL import Image
from torch.utils.data import Dataset

import data
import reflow
from model import StableDiffusion
from support import scenes


class Numbers(Dataset):
    """A source whose image number n is n: without end, or of `length` images."""

    def __init__(self, length=None):
        self.length, self.endless = length, length is None

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        return {"image": n}


def samples(source=None, seed=0, windows=8, points=1, shape=(2, 3), starts=0.0):
    return data.Samples(source or Numbers(), seed, shape, reflow.borders(windows), points, starts)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ---- sources ----


def test_a_scene_is_the_drawn_image_at_the_networks_scale_with_its_caption():
    item = data.Scenes(seed=3)[5]
    image, caption = scenes.sample(3, 5)
    assert item["image"].shape == (3, 64, 64) and item["image"].dtype == torch.float32
    assert item["image"].min() >= -1 and item["image"].max() <= 1 and item["caption"] == caption
    assert np.array_equal(((item["image"] + 1) * 127.5).round().byte().permute(1, 2, 0), image)


CAPTIONS = ["a red circle", "", "日本 語 – naïve café", "x" * 300, "🦆"]


@pytest.fixture
def latents(tmp_path):
    """Two files of cached latents, with what is in them."""
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    for name, part in ("b", slice(2, 5)), ("a", slice(0, 2)):
        data.write_latents(tmp_path / f"{name}.safetensors", mean[part], log_variance[part], CAPTIONS[part])
    return tmp_path, mean, log_variance


def test_written_latents_come_back_in_half_precision_and_captions_to_the_letter(latents):
    folder, mean, log_variance = latents
    source = data.Latents(folder)
    assert len(source) == 5 and sorted(file.name for file in folder.iterdir()) == ["a.safetensors", "b.safetensors"]
    for i in 4, 0, 2, 1, 3:
        item = source[i]
        assert item["caption"] == CAPTIONS[i] and item["mean"].dtype == item["log_variance"].dtype == torch.float32
        assert torch.equal(item["mean"], mean[i].half().float())
        assert torch.equal(item["log_variance"], log_variance[i].half().float())


def test_captions_may_all_be_empty(tmp_path):
    data.write_latents(tmp_path / "a.safetensors", torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8), ["", ""])
    assert [item["caption"] for item in (data.Latents(tmp_path)[0], data.Latents(tmp_path)[1])] == ["", ""]


def test_a_file_of_latents_appears_whole_or_not_at_all(latents, monkeypatch):
    folder, mean, log_variance = latents

    def fail_midway(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(data.checkpoint, "save_file", fail_midway)
    with pytest.raises(OSError, match="No space left"):
        data.write_latents(folder / "a.safetensors", 2 * mean, log_variance, CAPTIONS)
    assert torch.equal(data.Latents(folder)[0]["mean"], mean[0].half().float())


def test_a_folder_without_latents_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no latents")
    assert refusal(data.Latents, tmp_path) == f"{tmp_path} holds no latents (*.safetensors); check the path"


def test_other_tensors_than_latents_are_refused_by_name(latents):
    folder, *_ = latents
    rewrite(folder / "b.safetensors", lambda tensors: {"mean": tensors["mean"]})
    message = refusal(data.Latents, folder)
    assert message == f"{folder / 'b.safetensors'} holds no latents: captions, log_variance missing"


def test_a_file_of_latents_that_was_cut_short_is_refused(latents):
    folder, *_ = latents
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-100])
    assert f"{folder / 'b.safetensors'} is damaged" in refusal(data.Latents, folder)


# ---- samples ----


def test_a_sample_depends_on_seed_and_number_alone():
    ordered = [samples(points=3)[n] for n in range(6)]
    again = samples(points=3)
    for n in 4, 0, 5, 4, 2:
        assert equal(again[n], ordered[n])
    assert not np.array_equal(ordered[0]["noise"], ordered[1]["noise"])
    assert not np.array_equal(samples(seed=1, points=3)[0]["noise"], ordered[0]["noise"])


def test_noise_and_posterior_are_separate_standard_normal_draws():
    item = samples(shape=(4, 64, 64))[0]
    for name in "noise", "posterior":
        assert item[name].shape == (4, 64, 64) and item[name].dtype == torch.float32
        assert abs(item[name].mean()) < 0.03 and abs(item[name].std() - 1) < 0.03
    assert abs((item["noise"] * item["posterior"]).mean()) < 0.03


def test_the_first_time_is_spread_evenly_from_1_to_1000():
    source = samples(points=2)
    taus = np.array([int(source[n]["tau"][0]) for n in range(6000)])
    assert taus.min() == 1 and taus.max() == 1000
    counts, _ = np.histogram(taus, bins=np.arange(9) * 125 + 0.5)
    assert counts.sum() == 6000 and abs(counts - 750).max() < 100  # four standard deviations


@pytest.mark.parametrize("windows", [1, 3, 16])
def test_further_times_lie_anywhere_in_the_window_of_the_first_but_not_at_its_end(windows):
    source = samples(windows=windows, points=200)
    seen = torch.stack([source[n]["tau"] for n in range(150)])
    start, end = (border.view(seen.shape) for border in reflow.window_of(seen.flatten(), windows))
    assert seen.dtype == torch.int64 and (start == start[:, :1]).all() and (end == end[:, :1]).all()
    others = seen[:, 1:]
    if windows == 16:  # narrow enough that every time comes up
        assert sorted(set(others.flatten().tolist())) == list(range(1, 1001))
    place = (start - seen)[:, 1:] / (start - end)[:, 1:]
    assert abs(place.mean() - 0.5) < 0.02


def test_a_share_of_the_times_lies_at_the_start_of_its_window_and_changes_nothing_else():
    even, some, all_ = ([samples(windows=4, points=5, starts=share)[n] for n in range(200)] for share in (0, 0.3, 1))
    for a, b, c in zip(even, some, all_):
        start = -(-int(a["tau"][0]) // 250) * 250
        assert c["tau"].tolist() == [start] * 5
        assert all(time in (start, before) for time, before in zip(b["tau"].tolist(), a["tau"].tolist()))
        assert equal({**a, "tau": 0}, {**b, "tau": 0}) and equal({**a, "tau": 0}, {**c, "tau": 0})
    moved = np.mean([a["tau"].ne(b["tau"]).float().mean() for a, b in zip(even, some)])
    assert 0.25 < moved < 0.35


def test_a_tenth_of_the_captions_is_dropped():
    source = samples()
    assert 0.08 < np.mean([source[n]["dropped"] for n in range(2000)]) < 0.12


def test_every_image_comes_once_before_any_comes_again_and_then_in_another_order():
    source = samples(Numbers(50))
    epochs = [[source[n]["image"] for n in range(50 * epoch, 50 * epoch + 50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(50)]}) == 4
    assert [samples(Numbers(50), seed=1)[n]["image"] for n in range(50)] != epochs[0]


def test_the_order_of_a_finite_source_does_not_depend_on_what_was_read_before():
    fresh = {n: samples(Numbers(5))[n] for n in (12, 3, 7, 4, 11)}
    source = samples(Numbers(5))
    assert all(equal(source[n], sample) for n, sample in fresh.items())


# ---- batches ----


def read(first, count, size, rank=0, world=1, workers=0, source=None):
    return list(data.batches(samples(source, points=2), first, count, size, rank, world, workers))


def test_a_batch_is_the_samples_in_a_row():
    (batch,) = read(first=2, count=1, size=3)
    assert batch["image"].tolist() == [6, 7, 8]
    for i, n in enumerate([6, 7, 8]):
        assert equal({name: part[i] for name, part in batch.items()}, samples(points=2)[n])


@pytest.mark.parametrize("source", [None, Numbers(5)], ids=["endless", "finite"])
def test_the_batches_of_two_processes_together_are_those_of_one_twice_as_large(source):
    whole = read(first=1, count=3, size=4, source=source)
    halves = [read(first=1, count=3, size=2, rank=rank, world=2, source=source) for rank in (0, 1)]
    assert len(whole) == len(halves[0]) == len(halves[1]) == 3
    for batch, left, right in zip(whole, *halves):
        assert equal(batch, {name: torch.cat([left[name], right[name]]) for name in batch})


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_where_others_stopped(workers):
    whole = read(first=0, count=6, size=2, source=Numbers(5))
    later = read(first=2, count=4, size=2, workers=workers, source=Numbers(5))
    assert len(later) == 4 and all(equal(a, b) for a, b in zip(whole[2:], later))


# ---- folders of images ----


def write_image(file, mode="RGB", size=(96, 64), color=(200, 30, 60), caption="a caption", **settings):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color).convert(mode)
    image.save(file, **settings)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return image


def test_a_folder_tree_is_read_with_its_captions(tmp_path):
    write_image(tmp_path / "b/2.png", caption=" two\nlines ")
    write_image(tmp_path / "a/1.PNG", caption="日本")
    source = data.Folder(tmp_path, 32)
    assert [source[i]["caption"] for i in range(len(source))] == ["日本", "two lines"]
    image = source[0]["image"]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert torch.allclose(image[:, 5, 5], torch.tensor([200, 30, 60]) / 127.5 - 1)


def test_an_index_gives_captions_too(tmp_path):
    write_image(tmp_path / "sub/x.png", caption=None)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sub/x.png", "text": "from the index"}\n')
    assert data.Folder(tmp_path, 16)[0]["caption"] == "from the index"
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sub/x.png", "text": "good"}\n{"file_name": 3}\n')
    assert "metadata.jsonl, line 2" in refusal(data.Folder, tmp_path, 16)


def test_the_middle_is_cut_out_and_the_sizes_are_those_of_sdxl(tmp_path):
    file = tmp_path / "x.png"
    write_image(file, size=(200, 100))
    with Image.open(file) as image:
        image.paste((0, 0, 255), (0, 0, 50, 100))  # just the part that a crop of the middle leaves out
        image.save(file)
    item = data.Folder(tmp_path, 50)[0]
    assert item["time_ids"].tolist() == [100, 200, 0, 25, 50, 50]
    assert (item["image"][2, :, 2:] < 0).all()  # no blue but for what resizing smears over the border


def test_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    write_image(tmp_path / "x.jpg", size=(80, 40), exif=exif)
    assert data.Folder(tmp_path, 40)[0]["time_ids"].tolist() == [80, 40, 20, 0, 40, 40]


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "webp"), ("1", "bmp")])
def test_any_kind_of_image_becomes_rgb(tmp_path, mode, suffix):
    image = write_image(tmp_path / f"x.{suffix}", mode, color=(200, 200, 200))
    image = data.Folder(tmp_path, 64)[0]["image"]
    expected = np.array(image.convert("RGB")).astype(float).mean() / 127.5 - 1
    assert image.shape == (3, 64, 64) and image.mean().item() == pytest.approx(expected, abs=0.03)


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("nothing")
    assert data.Folder(tmp_path, 8)[0]["image"].min() == 1


def test_augmenting_crops_and_mirrors_by_the_sample_and_not_by_the_moment(tmp_path):
    gradient = np.tile(np.arange(128, dtype=np.uint8), (64, 1))
    Image.fromarray(gradient).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("a ramp")

    def draws(augment):
        return [samples(data.Folder(tmp_path, 64, augment))[n] for n in range(40)]

    rising = [(item["image"][0, 0, -1] > item["image"][0, 0, 0]).item() for item in draws(True)]
    assert 8 < sum(rising) < 32
    assert len({item["time_ids"][3].item() for item in draws(True)}) > 20
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(draws(True), draws(True)))
    assert {item["time_ids"][3].item() for item in draws(False)} == {32}


def test_bad_images_are_named_and_the_next_takes_their_place(tmp_path, capsys):
    for name in "abcd":
        write_image(tmp_path / f"{name}.png", caption=name)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.txt").write_text(" ")
    (tmp_path / "c.txt").unlink()
    source = data.Folder(tmp_path, 16)
    assert [source[i]["caption"] for i in (0, 0, 1, 2, 3)] == ["d"] * 5
    named = capsys.readouterr().err.splitlines()
    assert len(named) == 3 and all(line.startswith("notice: ") for line in named)  # each once
    assert "its caption is empty" in named[1] and str(tmp_path / "c") in named[2]


def test_too_many_bad_images_are_an_error(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02d}.png").write_bytes(b"no image")
        (tmp_path / f"{i:02d}.txt").write_text("a caption")
    message = refusal(data.Folder(tmp_path, 16).__getitem__, 0)
    assert message.startswith("11 of 30 images cannot be used")
    assert "holds neither latents nor captioned images" in refusal(data.Folder, tmp_path / "nowhere", 16)


def test_a_folder_is_cached_with_its_sizes(vae, tmp_path):
    for name in "ab":
        write_image(tmp_path / f"images/{name}.png", size=(96, 64), caption=name)
    data.cache(vae, data.Folder(tmp_path / "images", 64), 2, tmp_path / "latents")
    item = data.Latents(tmp_path / "latents")[1]
    assert item["caption"] == "b" and item["time_ids"].tolist() == [64, 96, 0, 16, 64, 64]
    assert item["mean"].shape == (4, 8, 8)


# ---- latents, made once ----


@pytest.fixture
def vae(sd15):
    return StableDiffusion.load(sd15).vae


def test_cached_latents_are_what_the_encoder_says(vae, tmp_path):
    data.cache(vae, data.Scenes(1), 7, tmp_path, shard=3)
    source = data.Latents(tmp_path)
    assert len(source) == 7 and len(list(tmp_path.glob("*.safetensors"))) == 3
    for i in 0, 3, 6:
        item = data.Scenes(1)[i]
        mean, log_variance = vae.encode(item["image"][None])
        assert source[i]["caption"] == item["caption"]
        torch.testing.assert_close(source[i]["mean"], mean[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(source[i]["log_variance"], log_variance[0], rtol=2e-3, atol=2e-3)


def test_an_interrupted_cache_goes_on_with_the_missing_files(vae, tmp_path, monkeypatch):
    data.cache(vae, data.Scenes(1), 7, tmp_path / "whole", shard=3)
    data.cache(vae, data.Scenes(1), 7, tmp_path / "parts", shard=3)
    (tmp_path / "parts/00001.safetensors").unlink()
    seen = []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambdan images: seen.append(len(images)) or encode(images))
    data.cache(vae, data.Scenes(1), 7, tmp_path / "parts", shard=3)
    assert seen == [3]
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


def test_processes_share_the_encoding(vae, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, files in ("1", ["00001"]), ("0", ["00000", "00001", "00002"]):
        monkeypatch.setenv("RANK", rank)
        data.cache(vae, data.Scenes(1), 7, tmp_path, shard=3)
        assert sorted(file.stem for file in tmp_path.glob("*.safetensors")) == files


def test_latents_of_another_vae_or_number_are_not_mixed(vae, tmp_path):
    data.cache(vae, data.Scenes(1), 2, tmp_path)
    assert "holds other latents" in refusal(data.cache, vae, data.Scenes(1), 3, tmp_path)
    assert "holds other latents" in refusal(data.cache, vae, data.Scenes(2), 2, tmp_path)
    vae.quant_conv.weight.data += 1
    assert "holds other latents" in refusal(data.cache, vae, data.Scenes(1), 2, tmp_path)
    (tmp_path / "made_of.json").unlink()
    assert "do not say of what" in refusal(data.cache, vae, data.Scenes(1), 2, tmp_path)


def test_the_command_caches_and_refuses_in_one_line(sd15, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", "cache", *map(str, arguments)])
        try:
            data.main()
        except SystemExit as stop:
            return stop.code

    assert run("--model", sd15, "--count", 2, "--out", tmp_path / "latents") is None
    assert len(data.Latents(tmp_path / "latents")) == 2
    capsys.readouterr()
    assert run("--model", tmp_path / "nowhere") == 2
    assert run("--model", sd15, "--count", 0) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors), errors


# ---- tar shards ----


@pytest.fixture
def shards(tmp_path):
    for k in range(3):
        write_shard(tmp_path / f"laion/{k:05d}.tar", range(10 * k, 10 * k + 10))
    return tmp_path / "laion"


def test_shards_are_found_by_folder_list_glob_and_range(shards):
    (shards / "some.txt").write_text("00002.tar\n\n00000.tar\n")
    for where, first in (
        (shards, 0),
        (shards / "*.tar", 0),
        (shards / "{00001..00002}.tar", 10),
        (shards / "some.txt", 20),
    ):
        assert data.open_source(where, 32)[0]["caption"] == f"caption {first}"
    assert len(data.Shards(shards / "{00001..00002}.tar", 32)) == 20
    assert f"{shards}/00003.tar does not exist" in refusal(data.Shards, shards / "{00001..00003}.tar", 32)
    assert "nowhere-*.tar does not exist" in refusal(data.Shards, shards / "nowhere-*.tar", 32)


def test_a_sample_of_a_shard_has_its_image_caption_and_the_size_it_once_had(shards):
    write_shard(shards / "00001.tar", [7], captions=False, facts={"original_width": 640, "original_height": 480})
    source = data.Shards(shards, 64)
    item = source[10]
    assert item["caption"] == "fact 7" and item["time_ids"].tolist() == [480, 640, 0, 16, 64, 64]
    assert torch.allclose(item["image"][:, 9, 9], torch.tensor([7, 0, 99]) / 127.5 - 1)
    assert source[11]["caption"] == "caption 20" and source[11]["time_ids"].tolist() == [64, 96, 0, 16, 64, 64]


def test_an_epoch_shuffles_shards_and_neighbors_and_leaves_nothing_out(shards):
    source = data.Shards(shards, 32, buffer=5)
    orders = [source.order(np.random.default_rng(seed)) for seed in range(20)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 20
    assert len({int(np.median(order[:9])) // 10 for order in orders}) == 3  # each shard comes first at times
    for order in orders:  # no shard is opened twice: what is read at a time lies together
        changes = np.flatnonzero(np.diff(order // 10))
        assert changes.max() - changes.min() <= 10 + 2 * 5


def test_a_tar_that_was_cut_short_is_named_and_used_as_far_as_it_goes(shards, capsys):
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[: len(whole) // 2])
    source = data.Shards(shards, 32)
    assert 25 <= len(source) <= 28 and "00001.tar is damaged" in capsys.readouterr().err
    captions = [source[i]["caption"] for i in range(len(source))]
    assert captions[-10:] == [f"caption {key}" for key in range(20, 30)]
    (shards / "00002.tar").write_bytes(b"no tar at all" * 100)
    assert "2 of 3 shards are damaged" in refusal(data.Shards, shards, 32)


def test_a_broken_image_in_a_shard_is_named_by_its_key(shards, capsys):
    content = bytearray((shards / "00000.tar").read_bytes())
    at = content.index(b"PNG")
    content[at + 10 : at + 60] = bytes(50)
    (shards / "00000.tar").write_bytes(content)
    item = data.Shards(shards, 32)[0]
    assert item["caption"] == "caption 1" and item["left_out"] == 1
    assert "00000.tar: 000000000.png is left out" in capsys.readouterr().err


def test_a_sample_without_caption_or_with_no_object_in_its_json_is_left_out(shards, capsys):
    write_shard(shards / "00000.tar", [1], captions=False, facts={"caption": None})
    write_shard(shards / "00001.tar", [2], captions=False)
    content = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(content.replace(b'{"caption": "fact 2"}', b"[1, 2, 3, 4, 5, 6, 7]"))
    assert data.Shards(shards, 32)[0]["caption"] == "caption 20"
    told = capsys.readouterr().err
    assert "its caption is empty" in told and "its JSON file holds no object" in told


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_read_every_sample_of_the_shards_once_and_go_on_where_they_stopped(shards, workers):
    def captions(first, count, rank):
        drawn = samples(data.Shards(shards, 32, buffer=6))
        return [name for batch in data.batches(drawn, first, count, 3, rank, 2, workers) for name in batch["caption"]]

    both = captions(0, 5, 0), captions(0, 5, 1)
    assert sorted(both[0] + both[1]) == sorted(f"caption {key}" for key in range(30))
    assert captions(2, 3, 1) == both[1][6:]


def test_an_error_in_a_reader_of_the_cache_is_one_line_as_well(sd15, tmp_path, capsys):
    for i in range(20):
        (tmp_path / f"images/{i:02d}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"images/{i:02d}.png").write_bytes(b"no image")
        (tmp_path / f"images/{i:02d}.txt").write_text("a caption")
    arguments = ["cache", "--model", sd15, "--data", tmp_path / "images", "--out", tmp_path / "latents"]
    assert exit_code(data, *arguments, "--workers", 1) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 11 of 20 images cannot be used")
