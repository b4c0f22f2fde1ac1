"""Text that users write: prompts, and captions of images. All of it is read here, so all of it is read alike."""

import csv
import io
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

from support.errors import InputError
from support.files import listed, read_json, read_text


def lines_of(text: str) -> list[str]:
    """Lines end at \\n or \\r\\n. Python's splitlines() ends them at characters that a caption may hold, too."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def caption_of(value: object) -> str:
    """A caption on one line, as JSON or CSV had it. Raises ValueError for what is no text, and for empty text."""
    if not isinstance(value, str):
        raise ValueError(f"its caption is {json.dumps(value)[:40]}, not text")
    if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):  # JSON can spell them
        raise ValueError("its caption holds a zero byte, or half a letter (a lone surrogate)")
    if not value.split():
        raise ValueError("its caption is empty")
    return " ".join(value.split())


def read_coco(path: Path) -> tuple[dict[object, list[str]], dict[object, str]]:
    """A COCO captions JSON: the captions of each image, and each image's file name, by image id, in the file's order.

    A caption that is no text is named on stderr and left out. A file may name no images. Raises InputError.
    """
    content, captions, names, problems = read_json(path), {}, {}, []
    try:
        for image in content.get("images") or []:
            names[image["id"]] = Path(image["file_name"]).name
        for annotation in content["annotations"]:
            try:
                caption = caption_of(annotation["caption"])
            except ValueError as error:
                problems.append(f"image {annotation['image_id']} ({error})")
            else:
                captions.setdefault(annotation["image_id"], []).append(caption)
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not a COCO captions JSON: annotations with image_id and caption") from None
    if problems:
        print(f"notice: {path}: {len(problems)} captions are left out: {listed(problems)}", file=sys.stderr)
    if not captions:
        raise InputError(f"{path} holds no captions")
    return captions, names


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; or from a COCO captions JSON the first caption of each image, in the order of the file."""
    if path.suffix.lower() == ".json":
        return [texts[0] for texts in read_coco(path)[0].values()]
    prompts = [line.strip() for line in lines_of(read_text(path)) if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompts; write one per line")
    return prompts


def read_metadata(index: Path) -> dict[Path, object]:
    """The captions in a metadata.jsonl or metadata.csv of Hugging Face, as they stand there, by image file.

    An entry has `file_name`, relative to the index, and `text` or `caption`. Raises InputError.
    """
    captions = []
    text = read_text(index)
    try:
        lines = (json.loads(line) for line in lines_of(text) if line.strip())
        for entry in csv.DictReader(io.StringIO(text, newline="")) if index.suffix == ".csv" else lines:
            file = index.parent / entry["file_name"].replace("\\", "/")
            captions.append((file, entry["text"] if "text" in entry else entry["caption"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error):
        place = f"{index}, entry {len(captions) + 1}"
        raise InputError(f"{place}: it does not have a file_name, and a text or caption") from None
    return dict(captions)


def unlearned_words(bpe: Tokenizer, prompts: list[str]) -> list[str]:
    """Words that a model of small vocabulary has never seen. CLIP's official vocabulary spells rare words from common
    pieces; the miniature's has every word of its captions as one token and no other."""
    if bpe.get_vocab_size() > 5000:
        return []
    words = dict.fromkeys(word.strip(",.") for prompt in prompts for word in prompt.split())
    return [word for word in words if len(bpe.encode(word, add_special_tokens=False).ids) > 1]
