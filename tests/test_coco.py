"""The protocols on COCO, from its own files to one line with a number, on a made-up COCO of a few images."""

import json
import os
import subprocess

import helpers
import numpy as np
import pytest
from helpers import ONE_THREAD, ROOT, exit_code, refusal
from PIL import Image

import fid
import sample
from evaluation import clip_score, coco


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """As COCO's: several captions of each image, not in order, with line breaks."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "val2017").mkdir()
    rng = np.random.default_rng(0)
    images, captions = [], []
    for k, number in enumerate((139, 42, 724, 285)):
        name = f"{number:012d}.jpg"
        pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((640, 427) if k % 2 else (480, 640)).save(folder / "val2017" / name)
        images.append({"id": number, "file_name": name})
        for i in (1, 0, 2):
            said = f"caption {i} of\n image {number} " if i else f"a red circle and a {number}"
            captions.append({"id": 10 * (5 - k) + i, "image_id": number, "caption": said})
    file = folder / "captions_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": captions}))
    return file


def prompts_of(protocol, annotations, out):
    coco.prepare(protocol, annotations, annotations.parent / "val2017", out)
    return (out / "prompts.txt").read_text().splitlines(), sorted(file.name for file in (out / "reference").iterdir())


def test_5k_is_the_caption_of_every_image_that_comes_first_in_the_file(annotations, tmp_path):
    prompts, reference = prompts_of("coco2017-5k", annotations, tmp_path)
    assert prompts == [f"caption 1 of image {number}" for number in (139, 42, 724, 285)]
    assert reference == [f"{number:012d}.jpg" for number in (42, 139, 285, 724)]
    assert (tmp_path / "reference" / reference[0]).is_symlink()


def test_images_are_copied_where_a_disk_has_no_links(annotations, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    _, (first, *_) = prompts_of("coco2017-5k", annotations, tmp_path)
    assert (tmp_path / "reference" / first).is_file() and not (tmp_path / "reference" / first).is_symlink()


def test_30k_are_any_captions_once_each_against_all_images(annotations, tmp_path, monkeypatch):
    every, _ = prompts_of("coco2014-30k", annotations, tmp_path / "all")
    assert len(set(every)) == 12
    monkeypatch.setattr(coco.CHOICES["coco2014-30k"], "count", 3)
    prompts, reference = prompts_of("coco2014-30k", annotations, tmp_path / "some")
    assert prompts == every[:3] and len(reference) == 4


def test_10k_is_dmd2s_draw(tmp_path, monkeypatch):
    """With pandas: `np.random.seed(123)`, then images.merge(annotations, "left", left_on="id", right_on="image_id")
    .sample(frac=1).drop_duplicates("file_name").sample(5). These rows are what pandas 3.1 gives for the file below."""
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (7, 3, 9, 1, 4, 8, 2)]
    rows = [(turn, image) for turn in range(3) for image in (4, 9, 7, 1, 8, 2, 3)]
    annotations = [{"id": 99 - n, "image_id": i, "caption": f"{turn} of {i}"} for n, (turn, i) in enumerate(rows)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "val2017").mkdir()
    for image in images:
        (tmp_path / "val2017" / image["file_name"]).touch()
    monkeypatch.setattr(coco.CHOICES["coco2014-10k"], "count", 5)
    prompts, reference = prompts_of("coco2014-10k", tmp_path / "c.json", tmp_path / "out")
    assert prompts == ["1 of 8", "0 of 7", "0 of 2", "1 of 9", "2 of 4"]
    assert reference == sorted(f"{prompt[-1]}.jpg" for prompt in prompts)


def test_bad_input_is_refused_in_one_line(annotations, tmp_path):
    content = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 2, "caption": "a"}]}
    (tmp_path / "bad.json").write_text(json.dumps(content))
    message = refusal(coco.prepare, "coco2017-5k", tmp_path / "bad.json", tmp_path, tmp_path)
    assert "holds no captions of its images" in message
    message = refusal(coco.prepare, "coco2017-5k", annotations, tmp_path, tmp_path / "out")
    assert "4 of 4 images are missing (0" in message and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_go_from_cocos_files_to_the_numbers_of_one(annotations, inception_file, tmp_path, capsys):
    def run(module, *arguments):
        command = helpers.command(module, *arguments, "--device", "cpu", processes=2)
        done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    assert exit_code(coco, "coco2017-5k", annotations, annotations.parent / "val2017", "--out", tmp_path) == 0
    prompts, reference, ours = tmp_path / "prompts.txt", tmp_path / "reference", tmp_path / "ours"
    how = ["--steps", 2, "--sampler", "ddim", "--guidance", 3, "--seed", 5]
    run(sample, "--model", ROOT / "weights/miniature", "--prompts", prompts, *how, "--out", ours)
    damaged = ours / "00000.png"  # its prompt can still be read
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    to_fid = [reference, ours, "--protocol", "coco2017-5k", "--weights", inception_file]
    for module, arguments in (fid, to_fid), (clip_score, [ours, "--clip", ROOT / "weights/miniature-clip"]):
        line, notices = run(module, *arguments)
        assert notices.count("00000.png is left out: ") == notices.count("1 of 4 images cannot be used") == 1
        capsys.readouterr()
        assert exit_code(module, *arguments, "--device", "cpu") == 0
        alone = capsys.readouterr().out
        assert line.split(": ")[1:] == alone.split(": ")[1:] and ("generated 3 of" in line or "3 images" in line)
        numbers = [float(text.split(": ")[0].split()[-1]) for text in (line, alone)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
