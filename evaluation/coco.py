"""COCO's captions and images as published numbers take them: what to draw, and what to compare it with.

    python -m evaluation.coco coco2017-5k captions_val2017.json val2017 --out coco5k
    torchrun --nproc-per-node 8 sample.py --model DIR --prompts coco5k/prompts.txt --steps 4 --out coco5k/ours
    torchrun --nproc-per-node 8 fid.py coco5k/reference coco5k/ours --protocol coco2017-5k
    torchrun --nproc-per-node 8 -m evaluation.clip_score coco5k/ours --clip CLIP-ViT-g-14-laion2B-s12B-b42K

The first command writes the prompts and links to the reference images, from COCO's own files, which are offered at
https://cocodataset.org/#download. The others need not know of COCO.
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fid import PROTOCOLS
from support.captions import read_coco
from support.errors import InputError, Parser, one_line_errors, positive_int
from support.files import listed, make_folder, replaced, write_text

Rows = list[tuple[str, object]]  # captions, each with the id of its image


def first_of_each(rows: Rows) -> Rows:
    """The first caption of each image."""
    first = {}
    for text, image in rows:
        first.setdefault(image, text)
    return [(text, image) for image, text in first.items()]


def shuffled(rows: Rows, random: np.random.RandomState | None = None) -> Rows:
    return [rows[i] for i in (random or np.random.RandomState(123)).permutation(len(rows))]


def one_of_each(rows: Rows) -> Rows:
    """DMD2's draw: of all captions, shuffled, the first of each image; shuffled again."""
    random = np.random.RandomState(123)
    return shuffled(first_of_each(shuffled(rows, random)), random)


@dataclass
class Choice:
    count: int  # of prompts
    choose: Callable[[Rows], Rows]  # the first of these are drawn
    all_images: bool  # the reference is every image there is, not those of the captions


CHOICES = {
    # GigaGAN; the paper's table 2. Its authors have a list of captions. If you have it, give it to sample.py.
    "coco2014-30k": Choice(PROTOCOLS["coco2014-30k"].count, shuffled, True),
    "coco2017-5k": Choice(PROTOCOLS["coco2017-5k"].count, first_of_each, False),  # Rectified Diffusion; table 1
    "coco2014-10k": Choice(PROTOCOLS["coco2014-10k"].count, one_of_each, False),  # DMD2, for SDXL; table 3
}


def prepare(protocol: str, captions_file: Path, images: Path, out: Path, count: int | None = None) -> None:
    """Write out/prompts.txt and out/reference; each appears whole or not at all. count: of prompts."""
    choice = CHOICES[protocol]
    count = count or choice.count
    captions, names = read_coco(captions_file)
    chosen = choice.choose([(text, image) for image in names for text in captions.get(image, [])])[:count]
    wanted = list(names) if choice.all_images else [image for _, image in chosen]
    if not chosen:
        raise InputError(f"{captions_file} holds no captions of its images")
    if missing := [names[image] for image in wanted if not (images / names[image]).is_file()]:
        raise InputError(f"{images}: {len(missing)} of {len(wanted)} images are missing ({listed(missing)})")
    make_folder(out)
    with replaced(out / "reference") as aside:
        aside.mkdir()
        for name in (names[image] for image in wanted):
            try:
                (aside / name).symlink_to((images / name).resolve())
            except OSError:  # exFAT disks, some network shares and Windows have no links
                shutil.copy(images / name, aside / name)
    write_text(out / "prompts.txt", "".join(f"{text}\n" for text, _ in chosen))
    print(f"{out / 'prompts.txt'}: {len(chosen)} of {count} prompts; {out / 'reference'}: {len(wanted)} images")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=CHOICES)
    parser.add_argument("captions", type=Path, help="captions_val2014.json or captions_val2017.json")
    parser.add_argument("images", type=Path, help="folder of the images, val2014 or val2017")
    parser.add_argument("--out", type=Path, required=True, help="folder for prompts.txt and reference")
    parser.add_argument("--count", type=positive_int, help="prompts, for a trial; default: the protocol's number")
    args = parser.parse_args()
    with one_line_errors(parser):
        prepare(args.protocol, args.captions, args.images, args.out, args.count)


if __name__ == "__main__":
    main()
