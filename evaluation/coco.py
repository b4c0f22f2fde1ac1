"""COCO's captions and pictures as published numbers take them: what to draw, and what to compare it with.

    python coco.py coco2017-5k captions_val2017.json val2017 --out coco5k
    torchrun --nproc-per-node 8 sample.py --model DIR --prompts coco5k/prompts.txt --steps 4 --out coco5k/ours
    torchrun --nproc-per-node 8 fid.py coco5k/reference coco5k/ours --protocol coco2017-5k
    torchrun --nproc-per-node 8 clip_score.py coco5k/ours --clip CLIP-ViT-g-14-laion2B-s12B-b42K

The first command writes the prompts and a folder of links to the reference pictures; the others need not know of COCO.
https://cocodataset.org/#download offers the captions (`annotations_trainval2014.zip`, `annotations_trainval2017.zip`)
and the pictures (`val2014.zip`, `val2017.zip`).
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import sample
from checkpoint import InputError

Caption = tuple[str, int]  # a caption, and the id of its picture


def first_of_each(captions: list[Caption]) -> list[Caption]:
    """The first caption of every picture, in the order of the pictures' ids."""
    first = {picture: text for text, picture in reversed(captions)}
    return [(first[picture], picture) for picture in sorted(first)]


def drawn_from_all(captions: list[Caption]) -> list[Caption]:
    """Any captions, in random order. GigaGAN's evaluation comes with a list of its own, a caption per line; who has it
    gives that to sample.py as --prompts, and needs of us only the reference."""
    return [captions[i] for i in np.random.RandomState(123).permutation(len(captions))]


def one_of_each(captions: list[Caption]) -> list[Caption]:
    """One caption of every picture, in random order: DMD2 shuffles with NumPy's seed 123."""
    chosen = first_of_each(captions)
    np.random.RandomState(123).shuffle(chosen)
    return chosen


@dataclass
class Choice:
    count: int
    choose: Callable[[list[Caption]], list[Caption]]
    all_pictures: bool  # the reference is every picture there is, not those of the captions


CHOICES = {
    "coco2014-30k": Choice(30_000, drawn_from_all, True),  # GigaGAN; the paper's table 2
    "coco2017-5k": Choice(5_000, first_of_each, False),  # Rectified Diffusion; table 1
    "coco2014-10k": Choice(10_000, one_of_each, False),  # DMD2, for SDXL; table 3
}


def read_annotations(file: Path) -> tuple[list[Caption], dict[int, str]]:
    """The captions of a COCO captions JSON by rising id, and the file name of every picture."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = sorted(content["annotations"], key=lambda entry: entry["id"])
        captions = [(" ".join(entry["caption"].split()), entry["image_id"]) for entry in entries]
        names = {entry["id"]: entry["file_name"] for entry in content["images"]}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the captions in {file}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file} is not a COCO captions JSON: images and annotations, with captions") from None
    captions = [(text, picture) for text, picture in captions if text and picture in names]
    if not captions:
        raise InputError(f"{file} holds no captions of its pictures")
    return captions, names


def prepare(protocol: str, captions_file: Path, pictures: Path, out: Path) -> int:
    """Write out/prompts.txt and out/reference; returns the number of prompts. Both appear whole or not at all."""
    choice = CHOICES[protocol]
    captions, names = read_annotations(captions_file)
    chosen = choice.choose(captions)[: choice.count]
    wanted = names.values() if choice.all_pictures else (names[picture] for _, picture in chosen)
    files = [pictures / Path(name).name for name in sorted(set(wanted))]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(files)} pictures are missing, {checkpoint.first(missing)}; check IMAGES"
        )
    sample.make_folder(out)
    aside = out / "reference.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for file in files:
        (aside / file.name).symlink_to(file.resolve())
    checkpoint.replace_folder(aside, out / "reference")
    checkpoint.write_text(out / "prompts.txt", "".join(f"{text}\n" for text, _ in chosen))
    if len(chosen) < choice.count:
        print(f"notice: {protocol} means {choice.count} captions, here are {len(chosen)}", file=sys.stderr)
    print(f"{out / 'prompts.txt'}: {len(chosen)} prompts; {out / 'reference'}: {len(files)} pictures")
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=CHOICES)
    parser.add_argument("captions", type=Path, help="captions_val2014.json or captions_val2017.json")
    parser.add_argument("images", type=Path, help="folder of the pictures, val2014 or val2017")
    parser.add_argument("--out", type=Path, required=True, help="folder for prompts.txt and reference")
    args = parser.parse_args()
    with checkpoint.one_line_errors(parser):
        prepare(args.protocol, args.captions, args.images, args.out)


if __name__ == "__main__":
    main()
