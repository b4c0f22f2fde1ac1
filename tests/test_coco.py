"""The protocols on COCO, from its own files to one line with a number, on a made-up COCO of a few images."""

import json
import subprocess
from pathlib import Path

import helpers
import numpy as np
import pytest
from helpers import ONE_THREAD, refusal
from PIL import Image

import fid
import sample
from evaluation import clip_score, coco

ROOT = Path(coco.__file__).parent


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """As COCO's: several captions of each image, not in order, one with a line break, images of any shape."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "val2017").mkdir()
    rng = np.random.default_rng(0)
    images, captions = [], []
    for k, number in enumerate((139, 42, 724, 285)):
        name = f"{number:012d}.jpg"
        pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
        shape = (640, 427) if k % 2 else (480, 640)
        Image.fromarray(pixels).resize(shape).convert("L" if k == 3 else "RGB").save(folder / "val2017" / name)
        images.append({"id": number, "file_name": name, "width": shape[0], "height": shape[1]})
        for i in (1, 0, 2):
            said = f"caption {i} of\n image {number} " if i else f"a red circle and a {number}"
            captions.append({"id": 10 * (5 - k) + i, "image_id": number, "caption": said})
    file = folder / "captions_val2017.json"
    file.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": captions}))
    return file


def prompts_of(protocol, annotations, out):
    coco.prepare(protocol, annotations, annotations.parent / "val2017", out)
    return (out / "prompts.txt").read_text().splitlines(), sorted(file.name for file in (out / "reference").iterdir())


def test_5k_is_the_first_caption_of_every_image_of_2017(annotations, tmp_path):
    prompts, reference = prompts_of("coco2017-5k", annotations, tmp_path)
    assert prompts == [f"a red circle and a {number}" for number in (42, 139, 285, 724)]
    assert reference == [f"{number:012d}.jpg" for number in (42, 139, 285, 724)]


def test_30k_are_any_captions_once_each_against_all_images(annotations, tmp_path, monkeypatch):
    every, _ = prompts_of("coco2014-30k", annotations, tmp_path / "all")
    assert len(set(every)) == 12 and "caption 1 of image 139" in every
    monkeypatch.setattr(coco.CHOICES["coco2014-30k"], "count", 3)
    prompts, reference = prompts_of("coco2014-30k", annotations, tmp_path / "some")
    assert prompts == every[:3] and len(reference) == 4


def test_10k_are_images_drawn_with_numpys_seed_123_and_just_those(annotations, tmp_path, monkeypatch):
    monkeypatch.setattr(coco.CHOICES["coco2014-10k"], "count", 2)
    order = [42, 139, 285, 724]
    np.random.seed(123)
    np.random.shuffle(order)
    prompts, reference = prompts_of("coco2014-10k", annotations, tmp_path)
    assert prompts == [f"a red circle and a {number}" for number in order[:2]]
    assert reference == sorted(f"{number:012d}.jpg" for number in order[:2])


def test_every_protocol_of_fid_says_what_to_draw_for_it():
    counts = {name: protocol.count for name, protocol in fid.PROTOCOLS.items() if name != "none"}
    assert counts == {name: choice.count for name, choice in coco.CHOICES.items()}


def test_bad_input_is_refused_in_one_line(annotations, tmp_path):
    images = annotations.parent / "val2017"
    for content in "no JSON", "{}", '{"images": [], "annotations": [{"id": 1}]}', "[]":
        (tmp_path / "bad.json").write_text(content)
        assert "is not a COCO captions JSON" in refusal(
            coco.prepare, "coco2017-5k", tmp_path / "bad.json", images, tmp_path
        )
    (tmp_path / "bad.json").write_text('{"images": [], "annotations": []}')
    assert "holds no captions" in refusal(coco.prepare, "coco2017-5k", tmp_path / "bad.json", images, tmp_path)
    assert "cannot read" in refusal(coco.prepare, "coco2017-5k", tmp_path / "nowhere.json", images, tmp_path)
    message = refusal(coco.prepare, "coco2017-5k", annotations, tmp_path, tmp_path / "out")
    assert message.startswith("4 of 4 images are missing") and not (tmp_path / "out").exists()


PROTOCOLS = [("coco2017-5k", "legacy", 2), ("coco2014-30k", "clean", 1), ("coco2014-10k", "clean", 1)]


@pytest.mark.parametrize("protocol, mode, processes", PROTOCOLS)
def test_a_protocol_goes_from_cocos_files_to_one_line_that_says_all(
    protocol, mode, processes, annotations, inception_file, tmp_path
):
    """Processes make the images, are interrupted, go on; and score them."""

    def run(module, *arguments, processes=processes):
        line = helpers.command(module, *arguments, processes=processes)
        done = subprocess.run(line, capture_output=True, text=True, env=ONE_THREAD)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    run(coco, protocol, annotations, annotations.parent / "val2017", "--out", tmp_path, processes=1)
    made = tmp_path / "ours"
    how = ["--prompts", tmp_path / "prompts.txt", "--steps", 2, "--sampler", "ddim", "--guidance", 3, "--seed", 5]
    how += ["--model", ROOT / "weights/miniature", "--out", made]
    run(sample, *how)
    (made / "00001.png").unlink()  # as if the run had not come so far
    kept = (made / "00000.png").stat().st_mtime_ns
    run(sample, *how)
    assert (made / "00000.png").stat().st_mtime_ns == kept
    line = run(fid, tmp_path / "reference", made, "--protocol", protocol, "--weights", inception_file, "--workers", 0)
    count = len((tmp_path / "prompts.txt").read_text().splitlines())
    assert "FID" in line and mode in line and f"protocol {protocol}" in line and "Inception" in line
    assert "reference 4 of" in line and f"generated {count} of" in line
    assert "steps 2" in line and "guidance 3" in line and "seed 5" in line
    line = run(clip_score, made, "--clip", ROOT / "weights/miniature-clip")
    assert line.startswith("CLIP score") and f"over {count} images" in line
