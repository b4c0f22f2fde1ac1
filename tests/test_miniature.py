"""The miniature: it can be trained from scratch and resumed, and what ships is a whole, good enough model."""

import diffusers
import pytest
import torch
import transformers
from elsewhere import other_device
from helpers import exit_code, same
from parity import draw

from clip_text import Tokenizer
from evaluation.clip_score import ClipScore
from miniature import judge
from miniature import train as miniature
from model import FLOW, MINIATURE, StableDiffusion
from support import scenes
from support.captions import read_prompts
from support.files import version_of
from support.scenes import TEST

ROOT = MINIATURE.parent.parent


def test_every_word_of_the_captions_is_one_token_of_a_vocabulary_in_the_official_files(tmp_path):
    tokenizer = miniature.make_tokenizer(tmp_path)
    captions = [scenes.caption(1, i) for i in range(200)]
    for word in {word for caption in captions for word in caption.replace(",", " , ").split()}:
        assert len(tokenizer.bpe.encode(word, add_special_tokens=False).ids) == 1, word
    assert (tokenizer([""])[0] == tokenizer.end).sum() == 76
    assert tokenizer.end == tokenizer.bpe.get_vocab_size() - 1  # the largest id, as in the official vocabulary
    # Resumed training must not number words anew; sets and dictionaries begin elsewhere every time.
    assert version_of(tmp_path / "vocab.json", tmp_path / "merges.txt") == "9247a65e3bae"
    captions.append("an unknown word: zebra!")
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer(captions).tolist() == reference(captions, padding="max_length", max_length=77).input_ids


STATED = {
    "one small blue cross at the top right": {("cross", "blue"): [0, 1, 5, 6]},
    "a big blue cross in the middle": {("cross", "blue"): [0, 2, 4, 7]},
    "a red ring above a red cross": {("ring", "red"): [0, 12], ("cross", "red"): [0, 14]},
    "a red ring to the right of a red cross": {("ring", "red"): [0, 11], ("cross", "red"): [0, 9]},
}


@pytest.mark.parametrize("caption", STATED)
def test_what_the_text_tower_learns_to_read_is_what_a_caption_says(caption):
    facts = miniature.stated_facts(caption).reshape(-1, 15)
    kinds = {tuple(miniature.KINDS[2 * kind][:2]): row.nonzero()[0].tolist() for kind, row in enumerate(facts)}
    assert {kind: row for kind, row in kinds.items() if row} == STATED[caption]


def test_interrupted_training_ends_with_the_weights_of_uninterrupted_training(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "SAVE_EVERY", 3)
    target = torch.nn.Linear(3, 2)

    def fit(work, stop_at=None):
        def compute_loss(step):
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3)
            return (network(x) - target(x).detach()).square().mean()

        torch.manual_seed(0)
        network = torch.nn.Linear(3, 2)
        miniature.fit(network, compute_loss, work, 20, lr=0.1)
        return network.state_dict()

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", stop_at=7)
    assert same(whole, fit(tmp_path / "parts"))


@pytest.mark.slow
def test_all_of_it_trains_from_scratch_on_another_device_into_official_folders(tmp_path):
    """A step of everything: the images are worthless, but the folders are whole and others open them."""
    out, clip = tmp_path / "model", tmp_path / "model-clip"
    command = ["--out", out, "--work", tmp_path / "work", "--iters", 1, "--scenes", 40]
    with other_device():
        assert exit_code(miniature, *command, "--device", "meta") == 0
    sd = StableDiffusion.load(out)
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


def test_what_ships_is_small():
    sizes = [sum(file.stat().st_size for file in path.rglob("*.safetensors")) for path in (MINIATURE, judge.CLIP)]
    assert sizes[0] < 8e6 and sum(sizes) < 12e6


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, steps, sampler, least", [(MINIATURE, 8, "ddim", (0.82, 0.66)), (FLOW, 4, "flow", (0.79, 0.50))]
)
def test_a_shipped_model_shows_its_prompts(model, steps, sampler, least):
    """50 test prompts of each kind; bounds about three standard errors below paper/README.md."""
    accuracy = judge.prompt_accuracy(StableDiffusion.load(model), steps, 4.0, TEST, 50, sampler)
    assert accuracy["one item"] > least[0] and accuracy["two items"] > least[1]


def test_the_demo_prompts_are_captions_of_the_miniature():
    for prompt in read_prompts(ROOT / "docs/demo_prompts.txt"):
        scenes.claims(prompt)
