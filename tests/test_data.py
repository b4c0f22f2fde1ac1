"""Which images training sees, and with which draws: a matter of seed and number alone. And data as others write it."""

import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from helpers import ROOT, exit_code, refusal, rewrite, write_shard
from PIL import Image
from torch.utils.data import Dataset

import data
from model import MINIATURE, StableDiffusion
from support import datasets
from support.latents import Latents, write_latents
from tools import cache

SLOW = pytest.mark.slow


class Numbers(Dataset):
    """A source whose image number n is n: without end, or of `length` images."""

    def __init__(self, length=None):
        self.length, self.endless = length, length is None

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        return {"image": n}


def samples(source=None, seed=0, windows=8, shape=(2, 3), starts=0.0, gap=0.0):
    return data.Samples(source or Numbers(), seed, shape, windows, starts, gap)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def captions(source):
    return [source[i]["caption"] for i in range(len(source))]


# ---- samples and batches ----


@pytest.mark.parametrize("source", [None, Numbers(7)], ids=["endless", "finite"])
def test_a_sample_depends_on_seed_and_number_alone(source):
    ordered, again = [samples(source)[n] for n in range(21)], samples(source)
    for n in 4, 0, 11, 4, 2:
        assert equal(again[n], ordered[n])
    assert not np.array_equal(ordered[0]["noise"], samples(source, seed=1)[0]["noise"])
    if source:  # every image once before any comes again, and then in another order
        epochs = [tuple(item["image"] for item in ordered[i : i + 7]) for i in (0, 7, 14)]
        assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) == 3


def test_draws_have_the_distributions_of_the_paper():
    items = [samples(shape=(2, 8))[n] for n in range(2400)]
    for name in "noise", "posterior":
        drawn = np.stack([item[name] for item in items])
        assert drawn.dtype == np.float32 and abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    counts, _ = np.histogram([item["tau"] for item in items], bins=np.arange(9) * 125 + 0.5)
    assert counts.sum() == 2400 and abs(counts - 300).max() < 65  # four standard deviations
    assert 0.075 < np.mean([item["uncond"] for item in items]) < 0.125


def test_a_share_of_the_times_lies_at_the_start_of_its_window_and_changes_nothing_else():
    even, some, all_ = ([samples(windows=4, starts=share)[n] for n in range(300)] for share in (0, 0.3, 1))
    for a, b, c in zip(even, some, all_):
        assert c["tau"] == -(-a["tau"] // 250) * 250 and b["tau"] in (a["tau"], c["tau"])
        assert equal({**a, "tau": 0}, {**b, "tau": 0}) and equal({**a, "tau": 0}, {**c, "tau": 0})
    assert 0.2 < np.mean([a["tau"] != b["tau"] for a, b in zip(even, some)]) < 0.4


def test_times_can_leave_out_the_end_of_every_window():
    even, gap, both = ([samples(windows=4, **how)[n]["tau"] for n in range(600)] for how in (
        {}, {"gap": 0.2}, {"gap": 0.2, "starts": 0.5}
    ))  # fmt: skip
    starts = [-(-tau // 250) * 250 for tau in even]
    assert gap == [start - int((start - tau) * 0.8) for start, tau in zip(starts, even)]
    assert max(start - tau for start, tau in zip(starts, gap)) in range(195, 200)  # of 250, the last 50 are left out
    moved = [a for a, b in zip(both, gap) if a != b]
    assert set(moved) == {250, 500, 750, 1000} and 0.4 < len(moved) / 600 < 0.6


def batches(first, count, size, rank=0, world=1, workers=0, source=None):
    return list(data.batches(samples(source), first, count, size, rank, world, workers))


@pytest.mark.parametrize("source, workers", [(None, 0), (Numbers(5), 0), pytest.param(Numbers(5), 2, marks=SLOW)])
def test_batches_depend_neither_on_processes_nor_on_interruptions(source, workers):
    whole = batches(first=1, count=3, size=4, source=source)
    halves = [batches(2, 2, size=2, rank=rank, world=2, workers=workers, source=source) for rank in (0, 1)]
    assert len(whole) == 3 and len(halves[0]) == len(halves[1]) == 2
    assert [part.dtype for part in whole[0].values()] == [torch.int64, torch.int64, *[torch.float32] * 2, torch.bool]
    assert all(equal({name: part[i] for name, part in whole[0].items()}, samples(source)[4 + i]) for i in range(4))
    for batch, left, right in zip(whole[1:], *halves):
        assert equal(batch, {name: torch.cat([left[name], right[name]]) for name in batch})


@SLOW
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_readers_need_no_shared_memory():
    program = "from support import datasets, loader; list(loader.load(datasets.Scenes(0), [range(40)] * 4, 2))"
    command = f'mount -t tmpfs -o size=1m none /dev/shm && exec "{sys.executable}" -c "{program}"'
    subprocess.run(["unshare", "-m", "sh", "-c", command], check=True, cwd=ROOT, timeout=120)


# ---- folders of images ----


def write_image(file, size=(96, 64), caption="a caption"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 60)).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")


def test_a_folder_tree_is_read_with_its_captions(tmp_path):
    write_image(tmp_path / "b/10.png", caption="\ufeff two\nlines ")
    write_image(tmp_path / "b/9.JPG", caption=None)
    (tmp_path / "b/9.TXT").write_text("upper case")
    write_image(tmp_path / "a/1.PNG", caption="日本")
    write_image(tmp_path / ".hidden/1.PNG")
    source = datasets.open_source(tmp_path, 32)
    assert captions(source) == ["日本", "upper case", "two lines"]
    image = source[0]["image"]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert torch.allclose(image[:, 5, 5], torch.tensor([200, 30, 60]) / 127.5 - 1)


LINE = '{{"file_name": "{}.png", "{}": "{}"}}\n'


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"metadata.jsonl": "\ufeff" + LINE.format("s/a", "caption", "x") + "\n \n"}, ["x"]),
        ({"metadata.jsonl": LINE.format("s\\\\a", "text", "x")}, ["x"]),
        ({"metadata.csv": '\ufefffile_name,text\r\ns/a.png,"x,\r\n ""y"""\r\n\r\n'}, ['x, "y"']),
        ({f"{s}/metadata.jsonl": LINE.format("a", "text", s) for s in "st"}, ["s", "t"]),
        ({"metadata.jsonl": LINE.format("s/a", "text", "x") + '{"file_name": "t/a.png", "text": null}'}, ["x", "x"]),
    ],
)
def test_captions_come_in_an_index_as_hugging_face_has_it(tmp_path, files, expected, capsys):
    for name in "s/a.png", "t/a.png", ".u/a.png":
        write_image(tmp_path / name, caption=None)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
    assert captions(datasets.open_source(tmp_path, 16)) == expected
    assert ("1 images" in capsys.readouterr().err) == (len(expected) == 1)  # those that no index lists


@pytest.mark.parametrize(
    "content", ['{"file_name": 3, "text": "x"}', "[1]", "{", '{"file_name": "x"}', "[" * 10**5], ids=range(5)
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    write_image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(LINE.format("a", "text", "good") + content)
    assert "metadata.jsonl, entry 2" in refusal(datasets.Folder, tmp_path, 16)


def test_images_and_captions_that_cannot_be_used_are_named_and_the_next_takes_their_place(tmp_path, capsys):
    for name in "abcdefg":
        write_image(tmp_path / f"{name}.png", caption=name)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.txt").write_text(" ")
    (tmp_path / "c.txt").unlink()
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "e.png").write_bytes(b"no image")
    (tmp_path / "f.png").unlink()
    (tmp_path / "f.png").symlink_to("nowhere")
    source = datasets.Folder(tmp_path, 16)
    assert source[0]["left_out"] == 6 and source[0]["left_out"] == 0 and captions(source) == ["g"] * 7
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6 and all(f"{tmp_path / name}.png is left out" in line for name, line in zip("abcdef", said))


def test_too_many_bad_images_are_an_error(tmp_path, capsys):
    for i in range(30):
        (tmp_path / f"{i:02d}.png").write_bytes(b"no image")
        (tmp_path / f"{i:02d}.txt").write_text("a caption")
    assert exit_code(cache, "--data", tmp_path, "--out", tmp_path / "latents") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 11 of 30 images cannot be used")


# ---- crops ----


def test_the_middle_is_cut_out_and_the_sizes_are_those_of_sdxl(tmp_path):
    write_image(tmp_path / "x.png", size=(200, 100))
    with Image.open(tmp_path / "x.png") as image:
        image.paste((0, 0, 255), (0, 0, 50, 100))  # just the part that a crop of the middle leaves out
        image.save(tmp_path / "x.png")
    item = datasets.Folder(tmp_path, 50)[0]
    assert item["time_ids"].tolist() == [100, 200, 0, 25, 50, 50]
    assert (item["image"][2, :, 2:] < 0).all()  # no blue but for what resizing smears over the border


def test_augmenting_crops_and_mirrors_by_the_sample_with_coordinates_of_the_image_as_it_is_seen(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("a ramp")
    items, again = ([samples(datasets.Folder(tmp_path, 64, True))[n] for n in range(40)] for _ in range(2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(items, again))
    mirrored = [item["image"][0, 0, 0] > item["image"][0, 0, -1] for item in items]
    for item, turned in zip(items, mirrored):
        shown, left = (ramp[:, ::-1] if turned else ramp), item["time_ids"][3].item()
        assert np.array_equal(((item["image"][0] + 1) * 127.5).round(), shown[:, left : left + 64])
    assert 8 < sum(mirrored) < 32 and len({item["time_ids"][3].item() for item in items}) > 20


# ---- tar shards ----


@pytest.fixture
def laion(tmp_path):
    for k in range(3):
        write_shard(tmp_path / f"laion/{k:05d}.tar", range(10 * k, 10 * k + 10))
    return tmp_path / "laion"


def test_shards_are_found_by_folder_glob_and_ranges(laion, tmp_path):
    (laion / "._00000.tar").write_bytes(b"of macOS")
    shutil.copytree(laion, tmp_path / "a[1]/1")
    shutil.copytree(laion, tmp_path / "a[1]/2")
    for where, first, count in (
        (laion, 0, 30), (laion / "*.tar", 0, 30), (laion / "{00001..00002}.tar", 10, 20),
        (tmp_path / "a[1]/{1..2}/{00001..00002}.tar", 10, 40), (tmp_path / "a[1]/{1..2}/*1.tar", 10, 20),
        (laion / "00002.tar", 20, 10),
    ):  # fmt: skip
        source = datasets.open_source(where, 32)
        assert (source[0]["caption"], len(source)) == (f"caption {first}", count)
    assert f"{laion}/00003.tar does not exist" in refusal(datasets.Shards, laion / "{00001..00003}.tar", 32)
    assert "nowhere-*.tar does not exist" in refusal(datasets.open_source, tmp_path / "nowhere-*.tar", 32)


def test_a_sample_of_a_shard_has_its_image_caption_and_the_size_it_once_had(laion):
    write_shard(laion / "00001.tar", [7], captions=False, facts={"original_width": 640, "original_height": 480})
    source = datasets.Shards(laion, 64)
    item = source[10]
    assert item["caption"] == "fact 7" and item["time_ids"].tolist() == [480, 640, 0, 16, 64, 64]
    assert torch.allclose(item["image"][:, 9, 9], torch.tensor([7, 0, 99]) / 127.5 - 1)
    assert source[11]["caption"] == "caption 20" and source[11]["time_ids"].tolist() == [64, 96, 0, 16, 64, 64]


def test_tars_as_others_write_them(laion, tmp_path):
    """Joined, without end blocks, with upper-case endings, with what macOS and notebooks leave there."""
    parts = [(laion / f"0000{k}.tar").read_bytes() for k in range(3)]
    whole = captions(datasets.Shards(laion, 16))
    (tmp_path / "joined.tar").write_bytes(b"".join(parts))
    assert captions(datasets.Shards(tmp_path / "joined.tar", 16)) == whole
    (tmp_path / "same.tar").write_bytes(parts[0] + parts[0])  # with the same names again
    assert captions(datasets.Shards(tmp_path / "same.tar", 16)) == whole[:10] * 2
    for k, part in enumerate(parts):
        (laion / f"0000{k}.tar").write_bytes(part.rstrip(b"\0") + bytes(-len(part.rstrip(b"\0")) % 512))
    assert captions(datasets.Shards(laion, 16)) == whole
    with tarfile.open(laion / "00000.tar") as before, tarfile.open(tmp_path / "others.tar", "w") as after:
        for member in before:
            key = member.name.upper()
            for name in f"./{key}", f"._{key}", f"__MACOSX/{key}", f".ipynb_checkpoints/{key}":
                member.name = name
                after.addfile(member, before.extractfile(member))
    assert captions(datasets.Shards(tmp_path / "others.tar", 16)) == whole[:10]
    with tarfile.open(laion / "00003.tar.gz", "w:gz") as tar:
        tar.add(laion / "00001.tar")
    for where in laion, laion / "00003.tar.gz":
        assert "00003.tar.gz is no .tar file; unpack it" in refusal(datasets.open_source, where, 16)


def test_an_epoch_shuffles_shards_and_neighbors_and_leaves_nothing_out(laion):
    source = datasets.Shards(laion, 32, buffer=5)
    orders = [source.order(np.random.default_rng(seed)) for seed in range(20)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 20
    assert len({int(np.median(order[:9])) // 10 for order in orders}) == 3  # each shard comes first at times
    for order in orders:  # no shard is opened twice: what is read at a time lies together
        changes = np.flatnonzero(np.diff(order // 10))
        assert changes.max() - changes.min() <= 10 + 2 * 5
    drawn = samples(datasets.Shards(laion, 32, buffer=6))
    both = [list(data.batches(drawn, 0, 5, 3, rank, 2, 0)) for rank in (0, 1)]
    assert sorted(name for part in both for b in part for name in b["caption"]) == sorted(captions(source))


@pytest.mark.parametrize("left", [0.5, 0.98, 0.0])
def test_a_tar_that_was_cut_short_is_named_and_used_as_far_as_it_goes(laion, left, capsys):
    whole = (laion / "00001.tar").read_bytes().rstrip(b"\0")
    (laion / "00001.tar").write_bytes(whole[: int(left * len(whole))])
    source = datasets.Shards(laion, 32)
    assert len(source) - 20 in range(int(10 * left) - 1, int(10 * left) + 2)
    assert "00001.tar is damaged" in capsys.readouterr().err
    assert captions(source)[-10:] == [f"caption {key}" for key in range(20, 30)]
    (laion / "00002.tar").write_bytes(b"no tar at all" * 100)
    assert "2 of 3 shards are damaged" in refusal(datasets.Shards, laion, 32)


def test_a_broken_sample_of_a_shard_is_named_by_its_key(laion, capsys, monkeypatch):
    content = bytearray((laion / "00000.tar").read_bytes())
    at = content.index(b"PNG")
    content[at + 10 : at + 60] = bytes(50)
    content = bytes(content).replace(b'"caption": "fact 1"', b"[[[[[[[[[[[[[[[[[[[")
    (laion / "00000.tar").write_bytes(content)
    item = datasets.Shards(laion, 32)[0]
    assert item["caption"] == "caption 2" and item["left_out"] == 2
    said = capsys.readouterr().err
    assert "00000.tar: 000000000.png is left out: cannot be read" in said and "000000001.png is left out" in said
    monkeypatch.setattr(datasets, "LARGEST", 50)
    assert "10 of 10 images" in refusal(datasets.Shards(laion / "00001.tar", 32).__getitem__, 0)


# ---- latents ----


CAPTIONS = ["a red circle", "", "日本 語 – naïve café", "x" * 300, "🦆"]


@pytest.fixture
def latents(tmp_path):
    """Two files of cached latents, with what is in them."""
    mean, log_variance = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, part in ("b", slice(2, 5)), ("a", slice(0, 2)), ("._a", slice(0, 1)):
        write_latents(tmp_path / f"{name}.safetensors", mean[part], log_variance[part], CAPTIONS[part])
    return tmp_path, mean, log_variance


def test_written_latents_come_back_in_half_precision_and_captions_to_the_letter(latents):
    folder, mean, log_variance = latents
    source = datasets.open_source(folder, 64)
    assert len(source) == 5
    for i in 4, 0, 2, 1, 3:
        item = source[i]
        assert item["caption"] == CAPTIONS[i] and item["mean"].dtype == item["log_variance"].dtype == torch.float32
        assert torch.equal(item["mean"], mean[i].half().float())
        assert torch.equal(item["log_variance"], log_variance[i].half().float())
    write_latents(folder / "c.safetensors", mean, log_variance, [""] * 5)
    assert captions(Latents(folder)) == CAPTIONS + [""] * 5


def test_what_cannot_be_trained_on_is_refused(latents, tmp_path):
    folder, *_ = latents
    for where in folder, None:
        assert "--augment cannot change drawn scenes or latents" in refusal(
            datasets.open_source, where, 64, augment=True
        )
    (tmp_path / "empty").mkdir()
    assert refusal(Latents, tmp_path / "empty").endswith("holds no latents (*.safetensors); check the path")
    rewrite(folder / "b.safetensors", lambda tensors: {"mean": tensors["mean"]})
    message = refusal(Latents, folder)
    assert message == f"{folder / 'b.safetensors'} holds no latents: captions, log_variance missing"


@pytest.fixture
def sd():
    return StableDiffusion.load(MINIATURE)


def test_cached_latents_are_what_the_encoder_says(sd, tmp_path, capsys):
    for name in "abc":
        write_image(tmp_path / f"images/{name}.png", caption=name)
    assert exit_code(cache, "--data", tmp_path / "images", "--count", 2, "--out", tmp_path / "latents") == 0
    found, source = Latents(tmp_path / "latents"), datasets.Folder(tmp_path / "images", 64)
    assert captions(found) == ["a", "b"]
    for i in 0, 1:
        mean, log_variance = sd.encode_moments(source[i]["image"][None])
        assert found[i]["time_ids"].tolist() == [64, 96, 0, 16, 64, 64]
        torch.testing.assert_close(found[i]["mean"], mean[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found[i]["log_variance"], log_variance[0], rtol=2e-3, atol=2e-3)
    assert exit_code(cache, "--data", tmp_path / "latents", "--out", tmp_path / "more") == 2
    assert capsys.readouterr().err.endswith("holds latents already\n")


def test_an_interrupted_cache_goes_on_and_processes_share_the_work(sd, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cache.cache(sd, datasets.Scenes(1), 5, whole, shard=2)
    encode, seen = sd.encode_moments, []
    monkeypatch.setattr(sd, "encode_moments", lambda images: seen.append(len(images)) or encode(images))
    for name, value in ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"):  # as torchrun does
        monkeypatch.setenv(name, value)
    for rank, numbers in ("1", [2]), ("0", [2, 2, 1]), ("0", [2, 2, 1]):
        monkeypatch.setenv("RANK", rank)
        cache.cache(sd, datasets.Scenes(1), 5, parts, shard=2)
        assert seen == numbers
    (parts / "00001.safetensors").unlink()
    assert "holds 3 of 5 latents" in refusal(Latents, parts)
    monkeypatch.setenv("RANK", "1")
    cache.cache(sd, datasets.Scenes(1), 5, parts, shard=2)
    assert seen == [2, 2, 1, 2]
    one, other = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (whole, parts))
    assert one == other


def test_latents_of_another_vae_source_or_number_are_not_mixed(sd, tmp_path):
    cache.cache(sd, datasets.Scenes(1), 2, tmp_path)
    assert "holds other latents" in refusal(cache.cache, sd, datasets.Scenes(1), 3, tmp_path)
    sd.vae.quant_conv.weight.data += 1
    assert "holds other latents" in refusal(cache.cache, sd, datasets.Scenes(1), 2, tmp_path)
    (tmp_path / "made_of.json").unlink()
    assert "do not say of what" in refusal(cache.cache, sd, datasets.Scenes(1), 2, tmp_path)
