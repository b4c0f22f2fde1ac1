"""Tokenizer and text encoder: the ids are those of transformers, and what the interface promises."""

import json
import shutil

import pytest
import torch
import transformers
from helpers import randomize
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from clip_text import BEGIN, END, ClipText, ClipTextConfig, Tokenizer, clip_bpe
from support import layouts
from support.errors import InputError
from support.weights import build, read_config

NASTY = [
    "",
    " ",
    "a red circle",
    "A  RED\t\ncircle   ",
    "don't we've they'll I'm he's you'd it're",
    "naïve café, ÅNGSTRÖM and ångström",  # composed and not
    "3.14159 in 2024, 1st",
    "&lt;b&gt; &amp;amp; html",
    "emoji 🙂👩‍👩‍👧 and 日本語 한국어 العربية",
    "hello!!! wow! (really?) -- [ok]_{x}^2",
    "a<|endoftext|>b <|startoftext|>",
    "<|EndOfText|>",
    "x" * 300,
    "one two three four five " * 40,
    "\u200b\ufeff zero width",
    "tabs\tand\u00a0no-break\u3000spaces",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An official tokenizer folder (vocab.json, merges.txt) with a small vocabulary of its own."""
    bpe = clip_bpe({END: 0}, [])
    letters = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator([*NASTY, *(open(__file__, encoding="utf-8").read().split("\n"))] * 3, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    names = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), BEGIN, END]
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    text = "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    set_padding(folder, END)
    return folder


def set_padding(folder, pad):
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": pad, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def folder_2(folder, tmp_path_factory):
    """SDXL's second tokenizer: the same, but padding with "!", id 0."""
    copy = tmp_path_factory.mktemp("second") / "tokenizer_2"
    shutil.copytree(folder, copy)
    set_padding(copy, "!")
    return copy


def reference_ids(folder, prompts):
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    return reference(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


@pytest.mark.parametrize("prompt", NASTY)
@pytest.mark.parametrize("which", ["folder", "folder_2"])
def test_token_ids_are_those_of_transformers(prompt, which, request):
    place = request.getfixturevalue(which)
    ids = Tokenizer.load(place)([prompt])
    assert ids.dtype == torch.int64 and ids.shape == (1, 77)
    assert ids.tolist() == reference_ids(place, [prompt]).tolist()


def test_a_tokenizer_json_gives_the_same_ids(folder, folder_2, tmp_path):
    for place, pad in (folder, "end"), (folder_2, "exclamation"):
        transformers.CLIPTokenizer.from_pretrained(place).save_pretrained(tmp_path / pad)
        assert not (tmp_path / pad / "vocab.json").exists()  # today's libraries write tokenizer.json alone
        assert torch.equal(Tokenizer.load(tmp_path / pad)(NASTY), Tokenizer.load(place)(NASTY))


def test_the_first_tokenizer_pads_with_the_end_token_the_second_with_exclamation_marks(folder, folder_2):
    first, second = Tokenizer.load(folder), Tokenizer.load(folder_2)
    end = first.end
    assert first(["a"])[0, 3:].tolist() == [end] * 74
    assert second(["a"])[0, 2:].tolist() == [end] + [0] * 74


def test_a_prompt_that_is_too_long_is_cut_with_a_notice_of_what_is_lost(folder, capsys):
    tokenizer = Tokenizer.load(folder)
    fits = "1" * 75  # every digit is a token
    ids = tokenizer([fits, fits + " Red circle"])
    assert torch.equal(ids[0], ids[1])
    assert ids[0, 0] == tokenizer.begin and ids[0, 76] == tokenizer.end
    notices = capsys.readouterr().err.splitlines()
    assert len(notices) == 1 and "Red circle" in notices[0] and "77 tokens" in notices[0]


def test_no_prompts_give_no_rows(folder):
    ids = Tokenizer.load(folder)([])
    assert ids.shape == (0, 77) and ids.dtype == torch.int64


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer: vocab.json and merges.txt, or tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_a_damaged_tokenizer_is_an_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t/vocab.json").write_text('{"a": 0,')
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.load(tmp_path / "t")


def test_a_vocabulary_that_is_not_clips_is_an_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t/vocab.json").write_text('{"a": 0}')
    (tmp_path / "t/merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"not CLIP's: its vocabulary lacks <\|startoftext\|>"):
        Tokenizer.load(tmp_path / "t")


SMALL = layouts.CLIP_L | {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 100,
}  # fmt: skip


def make(**changes):
    torch.manual_seed(0)
    return randomize(ClipText(read_config(ClipTextConfig, SMALL | changes, "text_encoder")), 0)


@pytest.mark.parametrize(
    "settings, parameters, tensors",
    [(layouts.SD15["text_encoder"], 123_060_480, 196), (layouts.SDXL["text_encoder_2"], 694_659_840, 517)],
)
def test_the_text_encoders_have_the_official_number_of_tensors(settings, parameters, tensors):
    state = build(ClipText, read_config(ClipTextConfig, settings, "text_encoder")).state_dict()
    assert (sum(w.numel() for w in state.values()), len(state)) == (parameters, tensors)


def test_a_token_sees_only_those_before_it():
    encoder, ids = make(), torch.arange(10, 30)[None]
    changed = ids.clone()
    changed[0, 12] = 99
    difference = (encoder(ids)[0] - encoder(changed)[0]).abs().amax(dim=-1)[0]
    assert difference[:12].max() == 0 and difference[12:].min() > 0


@pytest.mark.parametrize("eos_token_id", [2, 99])
def test_the_sentence_vector_is_taken_at_the_first_end_token(eos_token_id):
    # 2 is what old configs say; 99 is the end token and the largest id
    encoder, ids = make(eos_token_id=eos_token_id), torch.tensor([[98, 5, 2, 99, 99, 99], [98, 99, 0, 0, 0, 0]])
    last, _, pooled = encoder(ids)
    assert torch.equal(pooled, torch.stack([last[0, 3], last[1, 1]]))


def test_the_penultimate_output_skips_the_last_layer_and_the_norm():
    encoder, ids = make(), torch.tensor([[98, 5, 7, 99]])
    last, penultimate, _ = encoder(ids)
    layer = encoder.text_model.encoder.layers[-1]
    torch.testing.assert_close(encoder.text_model.final_layer_norm(layer(penultimate)), last)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported, only 'quick_gelu' and 'gelu'"),
        ({"model_type": "t5"}, "model_type = 't5' is not supported, only 'clip_text_model'"),
        ({"rotary": True}, "rotary = True is not supported: we do not know this setting"),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        read_config(ClipTextConfig, SMALL | change, "text_encoder")
