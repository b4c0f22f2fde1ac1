"""CLIP score: how well do images fit their prompts? (Radford et al. 2021; Hessel et al. 2021)

    python -m evaluation.clip_score IMAGES --clip weights/miniature-clip           prompts from the PNGs of sample.py
    torchrun --nproc-per-node 8 -m evaluation.clip_score IMAGES --clip DIR --prompts captions_val2014.json

CLIP's two towers map an image and a text to vectors of one space; the score is the cosine between the two. The towers
are in `clip_text.py` and `evaluation/clip_vision.py`. A model is a CLIP folder as the Hugging Face hub has them.

Shapes: B batch, D width of the space, S side of the square that the vision tower sees, in pixels.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clip_text import ClipText, Tokenizer
from evaluation.clip_vision import ClipImageConfig, ClipVision, image_config_of, prepare, read_towers
from fid import crop_then_resize
from support.captions import read_coco, read_prompts
from support.devices import choose_device, rank_and_world
from support.errors import InputError, Parser, count, one_line_errors, positive_int
from support.folders import find_tensors
from support.images import find_images, read_image, settings_of_png
from support.layouts import as_stored
from support.scoring import add_up, check_left_out, read_ahead, settings_of_run
from support.weights import assign, build


@dataclass
class Convention:
    """What a paper means by "CLIP score"."""

    formula: str
    prefix: str  # before the prompt
    scale: int  # times the cosine
    crop: Callable[[Image.Image], Image.Image]  # before CLIP's own preparation of images


CONVENTIONS = {
    # as `logits_per_image` of published CLIPs: temperature 1/100
    "logits": Convention("100 x cosine(image, prompt)", "", 100, lambda image: image),
    # Hessel et al. 2021, but neither weighted by 2.5 nor cut off at 0; images as in GigaGAN and DMD2
    "prefix": Convention(
        'cosine(image, "A photo depicts " + prompt)', "A photo depicts ", 1, partial(crop_then_resize, size=256)
    ),
}


# ---------------------------------------------------------------- both towers


class ClipScore:
    """A CLIP whose towers, tokenizer and preparation of images come from one folder. Made by `ClipScore.load`."""

    def __init__(
        self, text: ClipText, vision: ClipVision, tokenizer: Tokenizer, image_config: ClipImageConfig, name: str
    ):
        self.text, self.vision, self.tokenizer, self.image_config = text, vision, tokenizer, image_config
        cfg = vision.cfg  # a folder's name may be anything
        self.name = f"{name} ({cfg.num_hidden_layers} layers of {cfg.hidden_size}, patches of {cfg.patch_size} pixels)"

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> "ClipScore":
        """Load a CLIP folder of the usual layout, of any size, in float32; frozen, in eval mode. Raises InputError.

        It holds `config.json`, `model.safetensors` (or shards with an index), the tokenizer's files, and
        `preprocessor_config.json`, without which CLIP's own preparation is used.
        """
        text_config, vision_config = read_towers(folder)
        text, vision = build(ClipText, text_config), build(ClipVision, vision_config)
        both = nn.ModuleDict({"text": text, "vision": vision})  # at once: each tensor must be of the one or the other
        files = find_tensors(folder, "model", torch.float32)
        files.pop("logit_scale", None)  # the temperature, which matters in training only
        sources = {key: (key.partition(".")[2], as_stored) for key in both.state_dict()}
        assign(both, sources, files, device, torch.float32, str(folder))

        tokenizer = Tokenizer.load(folder)
        tokens, rows = tokenizer.bpe.get_vocab_size(), text.cfg.vocab_size
        if tokens != rows:  # its ids would be other words to the text tower
            raise InputError(f"{folder}: the tokenizer knows {tokens} tokens, the text tower {rows}; they do not fit")
        tokenizer.length = text.cfg.max_position_embeddings
        image_config = image_config_of(folder, vision.cfg.image_size)
        return cls(text, vision, tokenizer, image_config, folder.resolve().name)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image | np.ndarray] | Tensor) -> Tensor:
        """Images for `prepare`, or prepared ones (B, 3, S, S), -> embeddings (B, D), not normalized."""
        if not isinstance(images, Tensor):
            images = torch.stack([prepare(image, self.image_config) for image in images])
        return self.vision(images.to(self.vision.visual_projection.weight.device))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Prompts -> embeddings (B, D), not normalized. What is beyond 77 tokens is cut off, with a notice."""
        return self.text(self.tokenizer(prompts).to(self.text.text_projection.weight.device))[2]

    def similarity(self, images: Sequence[Image.Image | np.ndarray] | Tensor, prompts: list[str]) -> Tensor:
        """The cosine, from -1 to 1, between each image and its own prompt: (B,) fp32."""
        return F.cosine_similarity(self.image_features(images).float(), self.text_features(prompts).float())


# ---------------------------------------------------------------- a folder of images


def find_prompts(files: list[Path], source: Path | None) -> list[str]:
    """The prompt of each image. Raises InputError where it is not certain.

    Images of sample.py hold their own. Others are found in `source` by their names in a COCO captions JSON, or by the
    numbers that their names end in: an image id there, or the number of a line, from 0.
    """
    own = [settings_of_png(file).get("prompt") for file in files]
    if source is None:
        if None in own:
            file = files[own.index(None)]
            raise InputError(f"{file} does not hold its prompt, as images of sample.py do; give --prompts")
        return own
    if any(prompt is not None for prompt in own):
        raise InputError(f"{files[0].parent} holds images of sample.py, which hold their prompts; leave out --prompts")
    if source.suffix.lower() == ".json":
        captions, names = read_coco(source)
        prompts = {str(i): texts[0] for i, texts in captions.items()}
        prompts |= {Path(name).stem: captions[i][0] for i, name in names.items() if i in captions}
    else:
        prompts = {str(i): prompt for i, prompt in enumerate(read_prompts(source))}
        missing = len(prompts) - len(files)
        check_left_out(missing, len(prompts), files[0].parent, f"of the prompts in {source} are missing")
    found = {}
    for file in files:
        number = re.search("[0-9]*$", file.stem)[0]
        key = file.stem if file.stem in prompts else str(int(number or -1))
        if key not in prompts:
            raise InputError(f"{source} has no prompt for {file}; names should end in the number of a line, from 0")
        if key in found:
            raise InputError(f"{found[key]} and {file} have one number, so one prompt of {source}; keep one")
        found[key] = file
    return [prompts[key] for key in found]


def run(args: argparse.Namespace) -> None:
    rank, world = rank_and_world()
    files = find_images(args.images)
    settings_of_run(args.images, files)
    prompts = find_prompts(files, args.prompts)
    clip, how = ClipScore.load(args.clip, choose_device(args.device)), CONVENTIONS[args.convention]

    def read(file: Path) -> Tensor:
        return prepare(how.crop(read_image(file, on_white=True)), clip.image_config)

    # Of each image its score, and whether it could be read. Added up in one order however the work was shared.
    table = torch.zeros(2, len(files), dtype=torch.float64)
    mine = range(rank, len(files), world)
    title = None if rank else str(args.images)
    for batch in read_ahead([files[i] for i in mine], read, args.batch_size, args.workers, title):
        which = [mine[i] for i, _ in batch]
        images = torch.stack([image for _, image in batch])
        table[0, which] = how.scale * clip.similarity(images, [how.prefix + prompts[i] for i in which]).double().cpu()
        table[1, which] = 1
    total, count = add_up(table).sum(dim=1).tolist()
    check_left_out(len(files) - int(count), len(files), args.images)
    if rank == 0:
        print(f"CLIP score {total / count:.4f}: mean of {how.formula} over {int(count)} images, by {clip.name}")


def main() -> None:
    parser = Parser(description="How well do images fit their prompts? The CLIP score.")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--prompts", type=Path, help="text lines or COCO captions JSON; default: each PNG's own prompt")
    parser.add_argument("--clip", type=Path, required=True, help="CLIP folder")
    formulas = "; ".join(f"{name}: {how.formula}" for name, how in CONVENTIONS.items())
    parser.add_argument("--convention", choices=CONVENTIONS, default="logits", help=formulas)
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images for a forward pass")
    parser.add_argument("--workers", type=count, default=4, help="threads that read images")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    with one_line_errors(parser):
        run(parser.parse_args())


if __name__ == "__main__":
    main()
