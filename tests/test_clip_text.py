"""Tokenizer and text encoder: the ids are those of transformers, and what the interface promises.

test_parity.py compares the encoder's tensors and numbers with the reference's."""

import shutil

import pytest
import torch
import transformers
from helpers import TEXT, edit, randomize, read, refusal, write

from clip_text import BEGIN, END, ClipText, ClipTextConfig, Tokenizer
from support.weights import read_config

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
    "<|EndOfText|> and <|STARTOFTEXT|>, <|endoftext|",
    "a <word> <WORD>word",
    "x" * 300,
    "one two three four five " * 40,
    "\u200b\ufeff zero width",
    "tabs\tand\u00a0no-break\u3000spaces",
]


FORMS = ["SD1.5", "SDXL 2", "strings", "not normalized", "added", "decoder", "SDXL 2 json"]


def set_padding(folder, pad, normalized=None):
    """Special tokens as strings; or as the published files have them, found in any spelling if `normalized`."""
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END) | {"bos_token": BEGIN}
    if normalized is not None:
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False) | {"normalized": normalized}
        special = {role: {"__type": "AddedToken", "content": token} | flags for role, token in special.items()}
    write(folder / "special_tokens_map.json", special | {"pad_token": pad})
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    write(folder / "tokenizer_config.json", special | settings | {"pad_token": pad})


@pytest.fixture(scope="module", params=FORMS)
def form(request, tokenizer, tmp_path_factory):
    """The tokenizer's folder in the forms in which it is published: SDXL's second one pads with "!", id 0."""
    kind = request.param.removesuffix(" json")
    place = shutil.copytree(tokenizer, tmp_path_factory.mktemp("forms") / "tokenizer")
    normalized = {"strings": None, "not normalized": False}.get(kind, True)
    set_padding(place, "!" if kind == "SDXL 2" else END, normalized)
    size = len(read(place / "vocab.json"))
    if kind == "added":
        write(place / "added_tokens.json", {"<word>": size})
    if kind == "decoder":
        tokens = {size - 1: {"content": END, "special": True, "normalized": True}, size: {"content": "<word>"}}
        edit(place / "tokenizer_config.json", added_tokens_decoder=tokens)
    if request.param.endswith("json"):  # today's libraries write tokenizer.json alone
        transformers.CLIPTokenizer.from_pretrained(place).save_pretrained(place.parent / "json")
        return place.parent / "json"
    return place


def test_token_ids_are_those_of_transformers(form):
    ours, reference = Tokenizer.load(form), transformers.CLIPTokenizer.from_pretrained(form)
    wanted = reference(NASTY, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    ids = ours(NASTY)
    assert ids.dtype == torch.int64 and ids.shape == (len(NASTY), 77) and ours([]).shape == (0, 77)
    for prompt, row, theirs in zip(NASTY, ids.tolist(), wanted.tolist()):
        assert row == theirs, prompt


def test_a_prompt_that_is_too_long_is_cut_with_a_notice_of_what_is_lost(tokenizer, capsys):
    tokenizer = Tokenizer.load(tokenizer)
    fits = "1" * 75  # every digit is a token
    ids = tokenizer([fits, fits + " Red circle"])
    assert torch.equal(ids[0], ids[1])
    assert ids[0, 0] == tokenizer.begin and ids[0, 76] == tokenizer.end
    notices = capsys.readouterr().err.splitlines()
    assert len(notices) == 1 and "Red circle" in notices[0] and "77 tokens" in notices[0]


def test_texts_are_as_long_as_the_tokenizer_says(tokenizer, tmp_path):
    place = shutil.copytree(tokenizer, tmp_path / "t")
    for said, length in (248, 248), (None, 77), (10**30, 77):  # 10^30: the library did not know
        edit(place / "tokenizer_config.json", model_max_length=said)
        assert Tokenizer.load(place)(["a red circle"]).shape == (1, length)


@pytest.mark.parametrize(
    "file, content, complaint",
    [
        (None, "", "holds no tokenizer: vocab.json and merges.txt, or tokenizer.json"),
        ("vocab.json", '{"a": 0,', "cannot be read"),
        ("merges.txt", "a b c", "cannot be read"),
        ("tokenizer_config.json", '{"model_max_length": -1}', "model_max_length is -1"),
        ("special_tokens_map.json", '{"pad_token": {"a": 1}}', "cannot be read"),
        ("special_tokens_map.json", '{"pad_token": "<pad>"}', "is not CLIP's: its vocabulary lacks <pad>"),
        ("added_tokens.json", '{"<word>": 7}', "'<word>' does not get its id, 7"),
    ],
)
def test_a_damaged_tokenizer_is_refused(tokenizer, tmp_path, file, content, complaint):
    place = shutil.copytree(tokenizer, tmp_path / "t") if file else tmp_path
    if file:
        (place / file).write_text(content)
    message = refusal(Tokenizer.load, place)
    assert complaint in message and str(place) in message


@pytest.mark.parametrize("eos_token_id", [2, 99])
def test_the_sentence_vector_is_taken_at_the_first_end_token(eos_token_id):
    # 2 is what old configs say; 99 is the end token and the largest id
    settings = TEXT | {"vocab_size": 100, "eos_token_id": eos_token_id}
    encoder = randomize(ClipText(read_config(ClipTextConfig, settings, "text_encoder")), 0)
    last, _, pooled = encoder(torch.tensor([[98, 5, 2, 99, 99, 99], [98, 99, 0, 0, 0, 0]]))
    assert torch.equal(pooled, torch.stack([last[0, 3], last[1, 1]]))
