"""Text that users write: prompts, COCO captions, captions of a folder of images."""

import json
from pathlib import Path

from support.errors import InputError

Caption = tuple[str, int]  # a caption, and the id of its image


def read_prompts(file: Path) -> list[str]:
    """One prompt per line; or from a COCO captions JSON, the first caption of each image, in the order of image ids."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            captions = {}
            for annotation in sorted(json.loads(text)["annotations"], key=lambda a: a["id"]):
                captions.setdefault(annotation["image_id"], annotation["caption"])
            prompts = [" ".join(captions[image].split()) for image in sorted(captions)]
        else:
            prompts = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts in {file}: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is not a COCO captions JSON: annotations with id, image_id, caption") from None
    if not prompts:
        raise InputError(f"{file} holds no prompts; write one per line")
    return prompts


def read_annotations(file: Path) -> tuple[list[Caption], dict[int, str]]:
    """The captions of a COCO captions JSON by rising id, and the file name of every image."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = sorted(content["annotations"], key=lambda entry: entry["id"])
        captions = [(" ".join(entry["caption"].split()), entry["image_id"]) for entry in entries]
        names = {entry["id"]: entry["file_name"] for entry in content["images"]}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the captions in {file}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file} is not a COCO captions JSON: images and annotations, with captions") from None
    captions = [(text, image) for text, image in captions if text and image in names]
    if not captions:
        raise InputError(f"{file} holds no captions of its images")
    return captions, names


def read_index(index: Path) -> tuple[list[Path], list[str]]:
    files, captions = [], []
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            files.append(index.parent / entry["file_name"])
            captions.append(entry["text"] + "")
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{index}, line {number}: not a JSON object with file_name and text") from None
    return files, captions
