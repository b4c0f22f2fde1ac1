"""COCO's captions and images as published numbers take them: what to draw, and what to compare it with.

    python coco.py coco2017-5k captions_val2017.json val2017 --out coco5k
    torchrun --nproc-per-node 8 sample.py --model DIR --prompts coco5k/prompts.txt --steps 4 --out coco5k/ours
    torchrun --nproc-per-node 8 fid.py coco5k/reference coco5k/ours --protocol coco2017-5k
    torchrun --nproc-per-node 8 clip_score.py coco5k/ours --clip CLIP-ViT-g-14-laion2B-s12B-b42K

The first command writes the prompts and a folder of links to the reference images; the others need not know of COCO.
https://cocodataset.org/#download offers the captions (`annotations_trainval2014.zip`, `annotations_trainval2017.zip`)
and the images (`val2014.zip`, `val2017.zip`).
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.captions import read_annotations
from support.errors import InputError, one_line_errors
from support.files import listed, make_folder, replace_folder, write_text

Caption = tuple[str, int]  # a caption, and the id of its image


def first_of_each(captions: list[Caption]) -> list[Caption]:
    """The first caption of every image, in the order of the images' ids."""
    first = {image: text for text, image in reversed(captions)}
    return [(first[image], image) for image in sorted(first)]


def drawn_from_all(captions: list[Caption]) -> list[Caption]:
    """Any captions, in random order. GigaGAN's evaluation comes with a list of its own, a caption per line; who has it
    gives that to sample.py as --prompts, and needs of us only the reference."""
    return [captions[i] for i in np.random.RandomState(123).permutation(len(captions))]


def one_of_each(captions: list[Caption]) -> list[Caption]:
    """One caption of every image, in random order: DMD2 shuffles with NumPy's seed 123."""
    chosen = first_of_each(captions)
    np.random.RandomState(123).shuffle(chosen)
    return chosen


@dataclass
class Choice:
    count: int
    choose: Callable[[list[Caption]], list[Caption]]
    all_images: bool  # the reference is every image there is, not those of the captions


CHOICES = {
    "coco2014-30k": Choice(30_000, drawn_from_all, True),  # GigaGAN; the paper's table 2
    "coco2017-5k": Choice(5_000, first_of_each, False),  # Rectified Diffusion; table 1
    "coco2014-10k": Choice(10_000, one_of_each, False),  # DMD2, for SDXL; table 3
}


def prepare(protocol: str, captions_file: Path, images: Path, out: Path) -> int:
    """Write out/prompts.txt and out/reference; returns the number of prompts. Both appear whole or not at all."""
    choice = CHOICES[protocol]
    captions, names = read_annotations(captions_file)
    chosen = choice.choose(captions)[: choice.count]
    wanted = names.values() if choice.all_images else (names[image] for _, image in chosen)
    files = [images / Path(name).name for name in sorted(set(wanted))]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{len(missing)} of {len(files)} images are missing, {listed(missing)}; check IMAGES")
    make_folder(out)
    aside = out / "reference.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for file in files:
        (aside / file.name).symlink_to(file.resolve())
    replace_folder(aside, out / "reference")
    write_text(out / "prompts.txt", "".join(f"{text}\n" for text, _ in chosen))
    if len(chosen) < choice.count:
        print(f"notice: {protocol} means {choice.count} captions, here are {len(chosen)}", file=sys.stderr)
    print(f"{out / 'prompts.txt'}: {len(chosen)} prompts; {out / 'reference'}: {len(files)} images")
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=CHOICES)
    parser.add_argument("captions", type=Path, help="captions_val2014.json or captions_val2017.json")
    parser.add_argument("images", type=Path, help="folder of the images, val2014 or val2017")
    parser.add_argument("--out", type=Path, required=True, help="folder for prompts.txt and reference")
    args = parser.parse_args()
    with one_line_errors(parser):
        prepare(args.protocol, args.captions, args.images, args.out)


if __name__ == "__main__":
    main()
