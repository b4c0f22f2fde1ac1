"""Reading the files of CLIP's tokenizer, as transformers wrote them over the years.

Byte-pair encoding itself is the `tokenizers` package's; here is what the files say of it: the vocabulary, how text is
cut into words, which tokens are special, and how long a text may be. `clip_text.py` turns prompts into ids with it.
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from support.errors import InputError

FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def clip_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's byte-pair encoding: lower case, words end in `</w>`, digits stand alone, any other sign is its bytes."""
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def read_tokenizer(folder: Path, pad_token: str | None) -> tuple[tokenizers.Tokenizer, str, int, dict[str, bytes]]:
    """(byte-pair encoding, padding token, length of a text in tokens, the files) of an official `tokenizer/` folder:
    `vocab.json` and `merges.txt`, or `tokenizer.json`. pad_token: instead of the folder's own. Raises InputError."""
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    has_vocabulary = {"vocab.json", "merges.txt"} <= files.keys()
    if not has_vocabulary and "tokenizer.json" not in files:
        raise InputError(f"{folder} holds no tokenizer: vocab.json and merges.txt, or tokenizer.json")
    try:
        settings, special, added = (
            json.loads(files.get(name, "{}"))
            for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        )
        special = settings | special
        if pad_token:
            special["pad_token"] = pad_token
            files["tokenizer_config.json"] = json.dumps(settings | {"pad_token": pad_token}).encode()
            files["special_tokens_map.json"] = json.dumps(special).encode()
        if has_vocabulary:
            bpe = clip_bpe(*models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        else:
            bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        add_tokens(bpe, special, added)
        pad = special.get("pad_token") or END
        pad = str(pad["content"] if isinstance(pad, dict) else pad)  # some versions of the library write it so
        length = int(settings.get("model_max_length") or 77)
        length = length if length < 10**6 else 77  # the library writes 10^30 where it does not know
        if length < 3:
            raise ValueError(f"model_max_length is {length}")
    except Exception as error:  # the tokenizers package raises bare Exception for a damaged file
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"the tokenizer in {folder} cannot be read ({reason}); fetch its files again") from None
    if missing := [token for token in (BEGIN, END, pad) if bpe.token_to_id(token) is None]:
        raise InputError(f"the tokenizer in {folder} is not CLIP's: its vocabulary lacks {' and '.join(missing)}")
    return bpe, pad, length, files


def add_tokens(bpe: tokenizers.Tokenizer, special: dict, added: dict[str, int]) -> None:
    """Tokens that are looked for before anything else: the special ones, and words that someone added.

    So in SDXL's second tokenizer, which pads with "!", a "!" within a prompt is the padding token, as in the other
    libraries. A token that is `normalized` is found in any spelling, such as <|EndOfText|>.
    """
    tokens = {name: AddedToken(name, normalized=True) for name in sorted(added, key=added.get)}
    for token in [BEGIN, END, *(special.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad"))]:
        if token:
            token = token if isinstance(token, dict) else {"content": token}
            tokens[token["content"]] = as_added(token | {"special": True})
    listed = special.get("added_tokens_decoder", {})
    tokens |= {listed[i]["content"]: as_added(listed[i]) for i in sorted(listed, key=int)}
    ids = added | {listed[i]["content"]: int(i) for i in listed}
    known = {token.content for token in bpe.get_added_tokens_decoder().values()}  # a tokenizer.json has said it all
    for name, token in tokens.items():
        if name not in known and (name in ids or bpe.token_to_id(name) is not None):
            bpe.add_tokens([token])
    if wrong := [name for name, i in ids.items() if bpe.token_to_id(name) != i]:
        raise ValueError(f"the added token {wrong[0]!r} does not get its id, {ids[wrong[0]]}")


def as_added(token: dict) -> AddedToken:
    flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "special") if name in token}
    return AddedToken(token["content"], normalized=token.get("normalized", not token.get("special")), **flags)
