"""The miniature: it can be trained from nothing and resumed, and what ships is a whole, good enough model."""

import argparse
import itertools
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from helpers import exit_code
from parity import draw

import fid
from clip_text import Tokenizer
from evaluation.clip_score import ClipScore
from miniature import train as miniature
from model import StableDiffusion, flow_scheduler, save_flow
from support import scenes
from support.captions import read_prompts

SHIPPED = miniature.ROOT / "weights/miniature"
SHIPPED_CLIP = miniature.ROOT / "weights/miniature-clip"
shipped = pytest.mark.skipif(not SHIPPED.exists(), reason="no weights in this checkout")


def test_every_word_of_the_captions_is_one_token(tmp_path):
    tokenizer = miniature.make_tokenizer(tmp_path)
    for word in [*scenes.words(), ","]:
        assert len(tokenizer.bpe.encode(word, add_special_tokens=False).ids) == 1, word
    assert (tokenizer([""])[0] == tokenizer.end).sum() == 76
    assert tokenizer.end == tokenizer.bpe.get_vocab_size() - 1  # the largest id, as in the official vocabulary


def test_a_second_caption_tells_of_the_same_scene_and_more_of_it():
    told = {"first": 0, "second": 0}
    for index in range(400):
        scene = scenes.make_scene(np.random.default_rng((miniature.TRAIN, index)))
        captions = {"first": scenes.sample(miniature.TRAIN, index)[1], "second": miniature.detailed_caption(index)}
        for name, caption in captions.items():
            facts = scenes.claims(caption)
            assert scenes.holds(facts, scene), caption
            told[name] += (facts.relation is not None) + sum(
                (item.size is not None) + (item.position is not None) for item in facts.items
            )
    assert told["second"] > 1.4 * told["first"] > 100


def test_what_the_text_tower_learns_to_read_is_what_captions_say():
    def told(caption):
        facts = miniature.told_in(caption).reshape(-1, 15)
        kinds = {tuple(miniature.KINDS[2 * kind][:2]): fact.tolist() for kind, fact in enumerate(facts) if fact.any()}
        return {kind: [i for i, fact in enumerate(facts) if fact] for kind, facts in kinds.items()}

    assert told("a red ring") == {("ring", "red"): [0]}
    assert told("one small blue cross at the top right") == {("cross", "blue"): [0, 1, 5, 6]}
    assert told("a big blue cross in the middle, a red ring on the left") == {
        ("cross", "blue"): [0, 2, 4, 7],
        ("ring", "red"): [0, 3],
    }
    assert told("a red ring above a red cross") == {("ring", "red"): [0, 12], ("cross", "red"): [0, 14]}
    assert told("a red ring to the right of a red cross") == {("ring", "red"): [0, 11], ("cross", "red"): [0, 9]}

    def of_items(caption):
        return replace(scenes.claims(caption), count=None, tone=None, pattern=None)

    compared = 0
    for index in range(200):
        rng = np.random.default_rng((miniature.TRAIN, index))
        true, *false = scenes.captions(scenes.make_scene(rng), rng, wrong=4)
        for caption in (caption for caption in false if of_items(caption) != of_items(true)):
            compared += 1
            assert (miniature.told_in(caption) != miniature.told_in(true)).any(), (true, caption)
    assert compared > 300


@shipped
def test_the_shipped_text_tower_tells_sides_apart_and_not_only_colors():
    sd = StableDiffusion.load(SHIPPED)

    def far(a, b):
        with torch.no_grad():
            first, second = sd.text_encoders[0](sd.tokenizers[0]([a, b]))[2]
        return (first - second).norm()

    color = far("a red circle", "a blue circle")
    assert far("a red circle on the left", "a red circle on the right") > color / 5
    assert far("a red ring above a blue ring", "a red ring below a blue ring") > color / 5


def test_the_vocabulary_is_in_the_official_files(tmp_path):
    captions = [scenes.sample(0, i)[1] for i in range(50)] + ["an unknown word: zebra!"]
    ids = miniature.make_tokenizer(tmp_path)(captions)
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert ids.tolist() == reference(captions, padding="max_length", max_length=77).input_ids


def test_the_vocabulary_is_always_the_same(tmp_path):
    """Else training that is resumed would go on with words numbered anew."""
    code = "import miniature, sys; from pathlib import Path; miniature.make_tokenizer(Path(sys.argv[1]))"
    for run, seed in (("a", "1"), ("b", "2")):  # sets and dictionaries of Rust and Python begin elsewhere every time
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, tmp_path / run], check=True, cwd=miniature.ROOT, env=environment)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def arguments(work, **changes):
    settings = {
        "work": work,
        "device": "cpu",
        "workers": 0,
        "iters": None,
        "batch_size": 4,
        "scenes": 300,
        "part": "all",
        "compile": False,
    }
    return argparse.Namespace(**settings | changes)


def test_interrupted_training_ends_with_the_weights_of_uninterrupted_training(tmp_path, monkeypatch):
    ticks = itertools.count(0, 1000)
    monkeypatch.setattr(time, "time", lambda: next(ticks))  # every step it is time to save again
    target = torch.nn.Linear(3, 2)

    def train(work, stop_at=None):
        work.mkdir(exist_ok=True)

        def steps(first, count):
            for step in range(first, first + count):
                if step == stop_at:
                    raise KeyboardInterrupt
                yield step

        def loss_of(_, step):
            x = torch.randn(8, 3)
            return (network(x) - target(x).detach()).square().mean()

        torch.manual_seed(0)
        network = torch.nn.Linear(3, 2)
        return miniature.fit("net", network, loss_of, steps, arguments(work), 20, lr=0.1, low_precision=False)

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop_at=7)
    resumed = train(tmp_path / "parts")
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


@shipped
def test_a_tenth_of_the_training_is_of_noisy_times_and_detailed_captions_alone(tmp_path, monkeypatch):
    sd, seen = StableDiffusion.load(SHIPPED), {}
    sd.unet.register_forward_pre_hook(lambda _, given: seen.update(t=given[1], text=given[2]))
    monkeypatch.setattr(miniature, "fit", lambda name, network, loss_of, *rest, **settings: loss_of)
    loss_of = miniature.train_unet(sd, arguments(tmp_path, iters=100, scenes=40, batch_size=128, init=None))
    detailed = [miniature.detailed_caption(i) for i in range(40)]
    known = miniature.encode_texts(sd.text_encoders[0], sd.tokenizers[0]([*detailed, ""]), "cpu").flatten(1)

    def detailed_alone():
        return all((text.half() == known).all(dim=1).any() for text in seen["text"].flatten(1))

    with torch.no_grad():
        loss_of(None, 9)
        assert seen["t"].min() >= 400 and detailed_alone()
        loss_of(None, 10)
        assert seen["t"].min() < 400 and not detailed_alone()


def test_all_of_it_trains_from_nothing_into_official_folders(tmp_path, monkeypatch):
    """Three steps of everything: the images are worthless, but the folders are whole and others open them."""
    out, clip = tmp_path / "model", tmp_path / "clip"
    options = {
        "--out": out,
        "--clip": clip,
        "--work": tmp_path / "work",
        "--iters": 3,
        "--scenes": 300,
        "--device": "cpu",
    }
    monkeypatch.setattr(sys, "argv", ["miniature.py", *words_of(options)])
    miniature.main()
    sd = StableDiffusion.load(out)
    check_that_others_open(out, clip, sd)

    further = tmp_path / "further"
    monkeypatch.setattr(
        sys,
        "argv",
        ["miniature.py", *words_of(options | {"--init": out, "--out": further, "--work": tmp_path / "work"})],
    )
    miniature.main()
    again = StableDiffusion.load(further)
    assert torch.equal(again.vae.quant_conv.weight, sd.vae.quant_conv.weight)
    assert not torch.equal(again.unet.conv_in.weight, sd.unet.conv_in.weight)


def words_of(options):
    return [str(part) for option in options.items() for part in option]


def check_that_others_open(out, clip, sd):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    x, t, prompt = draw(2, 4, 8, 8), torch.tensor([999, 1]), ["a red circle", ""]
    text = pipeline.text_encoder(Tokenizer.load(out / "tokenizer")(prompt)).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(sd.encode_prompt(prompt)[0], text, atol=1e-5, rtol=1e-4)
        expected = pipeline.unet(x, t, text).sample
        torch.testing.assert_close(sd.unet(x, t, text), expected, atol=1e-5, rtol=1e-4)
        images = draw(2, 3, 64, 64)
        theirs = transformers.CLIPModel.from_pretrained(clip, dtype=torch.float32).get_image_features(images)
        theirs = getattr(theirs, "pooler_output", theirs)
        torch.testing.assert_close(ClipScore.load(clip).vision(images), theirs, atol=1e-4, rtol=1e-3)


def test_the_frechet_distance_has_known_values():
    rng = np.random.default_rng(0)
    a, b = (np.cov(rng.standard_normal((50, 8)) @ rng.standard_normal((8, 8)), rowvar=False) for _ in range(2))
    mean = rng.standard_normal(8)
    assert fid.frechet_distance(mean, a, mean, a) == pytest.approx(0, abs=1e-8 * np.trace(a))
    assert fid.frechet_distance(mean, a, mean + 2, a) == pytest.approx(8 * 4)
    # of diagonal covariances: the sum of (standard deviation - standard deviation)^2
    assert fid.frechet_distance(mean, np.diag([1.0, 4.0]), mean, np.diag([9.0, 0.0])) == pytest.approx(4 + 4)
    assert fid.frechet_distance(mean, a, mean, b) == pytest.approx(fid.frechet_distance(mean, b, mean, a))


@shipped
def test_the_shipped_model_is_small():
    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    assert size(SHIPPED) < 8e6 and size(SHIPPED) + size(SHIPPED_CLIP) < 12e6


@shipped
def test_the_shipped_model_keeps_to_its_prompts():
    """100 of the prompts that `miniature.py --evaluate` measures; bounds three standard errors below README."""
    sd = StableDiffusion.load(SHIPPED)
    assert miniature.accuracy(sd, 32, 5.0, miniature.TEST, named=1, count=100) > 0.88
    assert miniature.accuracy(sd, 32, 5.0, miniature.TEST, named=2, count=100) > 0.76


@shipped
def test_evaluation_chooses_the_guidance_on_validation_prompts_and_reports_on_others(tmp_path, monkeypatch, capsys):
    asked, real = [], miniature.accuracy

    def accuracy(sd, steps, guidance, seed, named, count, sampler):
        asked.append((seed, guidance, steps, sampler))
        return guidance == 3 if seed == miniature.VALIDATION else real(sd, steps, guidance, seed, named, 1, sampler)

    monkeypatch.setattr(miniature, "accuracy", accuracy)
    teacher, out = StableDiffusion.load(SHIPPED), tmp_path / "one-window"
    save_flow(teacher.unet, flow_scheduler(teacher, 1), SHIPPED, out, torch.float32)
    assert exit_code(miniature, "--evaluate", "--out", out, "--images", 2, "--device", "cpu") == 0
    assert {(guidance, steps) for seed, guidance, steps, _ in asked if seed == miniature.TEST} == {
        (3.0, steps) for steps in (8, 4, 2, 1)
    }
    assert {steps for seed, _, steps, _ in asked if seed == miniature.VALIDATION} == {8}
    lines = capsys.readouterr().out.splitlines()
    assert "guidance 3, 2 images at 2" in lines[5] and len(lines) == 13 and lines[-1].startswith("| flow | 1 |")
    asked.clear()
    guided = miniature.ROOT / "weights/proreflow-ii-guided"
    assert exit_code(miniature, "--evaluate", "--out", guided, "--images", 0, "--device", "cpu") == 0
    assert {guidance for _, guidance, _, _ in asked} == {1.0}


@shipped
def test_the_demo_prompts_are_captions_of_the_miniature():
    for prompt in read_prompts(miniature.ROOT / "docs/demo_prompts.txt"):
        scenes.claims(prompt)
