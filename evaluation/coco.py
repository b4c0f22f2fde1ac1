"""COCO's captions and images as published numbers take them: what to draw, and what to compare it with.

    python -m evaluation.coco coco2017-5k captions_val2017.json val2017 --out coco5k
    torchrun --nproc-per-node 8 sample.py --model DIR --prompts coco5k/prompts.txt --steps 4 --out coco5k/ours
    torchrun --nproc-per-node 8 fid.py coco5k/reference coco5k/ours --protocol coco2017-5k
    torchrun --nproc-per-node 8 -m evaluation.clip_score coco5k/ours --clip CLIP-ViT-g-14-laion2B-s12B-b42K

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

from support.captions import read_coco
from support.errors import one_line_errors
from support.files import listed, make_folder, replaced, write_text
from support.scoring import check_left_out

Rows = list[tuple[str, object]]  # captions, each with the id of its image


def first_of_each(captions: dict[object, list[str]], names: dict[object, str]) -> Rows:
    """The first caption of each image, in the order of the file."""
    return [(texts[0], image) for image, texts in captions.items()]


def drawn_from_all(captions: dict[object, list[str]], names: dict[object, str]) -> Rows:
    """Any captions, in random order. GigaGAN's evaluation comes with a list of its own, a caption per line; who has it
    gives that to sample.py as --prompts, and needs of us only the reference."""
    return shuffled(by_image(captions, names), np.random.RandomState(123))


def one_of_each(captions: dict[object, list[str]], names: dict[object, str]) -> Rows:
    """Of all captions, shuffled, the first of each image; shuffled again. With DMD2's seed it is DMD2's draw."""
    random, first = np.random.RandomState(123), {}
    for text, image in shuffled(by_image(captions, names), random):
        first.setdefault(image, text)
    return shuffled([(text, image) for image, text in first.items()], random)


def by_image(captions: dict[object, list[str]], names: dict[object, str]) -> Rows:
    return [(text, image) for image in names for text in captions.get(image, [])]


def shuffled(rows: Rows, random: np.random.RandomState) -> Rows:
    return [rows[i] for i in random.permutation(len(rows))]


@dataclass
class Choice:
    count: int
    choose: Callable[[dict, dict], Rows]
    all_images: bool  # the reference is every image there is, not those of the captions


CHOICES = {
    "coco2014-30k": Choice(30_000, drawn_from_all, True),  # GigaGAN; the paper's table 2
    "coco2017-5k": Choice(5_000, first_of_each, False),  # Rectified Diffusion; table 1
    "coco2014-10k": Choice(10_000, one_of_each, False),  # DMD2, for SDXL; table 3
}


def link(file: Path, place: Path) -> None:
    try:
        place.symlink_to(file.resolve())
    except OSError:  # exFAT, some network shares and Windows have no links
        shutil.copy(file, place)


def prepare(protocol: str, captions_file: Path, images: Path, out: Path) -> int:
    """Write out/prompts.txt and out/reference; returns the number of prompts. Each appears whole or not at all."""
    choice = CHOICES[protocol]
    captions, names = read_coco(captions_file)
    captions = {image: texts for image, texts in captions.items() if image in names}
    chosen = choice.choose(captions, names)[: choice.count]
    wanted = names if choice.all_images else [image for _, image in chosen]
    missing = {image: names[image] for image in wanted if not (images / names[image]).is_file()}
    told = f"are not in {images} ({listed(list(missing.values()))})"
    check_left_out(len(missing), len(wanted), captions_file, told)
    if missing:
        print(f"notice: {len(missing)} of {len(wanted)} images {told}; left out on both sides", file=sys.stderr)
    chosen = [(text, image) for text, image in chosen if image not in missing]
    files = sorted(names[image] for image in wanted if image not in missing)
    make_folder(out)
    with replaced(out / "reference") as aside:
        aside.mkdir()
        for name in files:
            link(images / name, aside / name)
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
