"""CLIP score: how well do images fit their prompts? (Radford et al. 2021; Hessel et al. 2021)

    python -m evaluation.clip_score IMAGES --clip weights/miniature-clip           prompts from the PNGs of sample.py
    torchrun --nproc-per-node 8 -m evaluation.clip_score IMAGES --clip DIR --prompts captions_val2014.json

CLIP's two towers map an image and a text to vectors of one space; the score is the cosine between the two. The towers
are in `clip_text.py` and `evaluation/clip_vision.py`. A model is a CLIP folder as the Hugging Face hub has them.

Shapes: B batch, D width of the space, S side of the square that the vision tower sees, in pixels.
"""

import argparse
import math
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

from clip_text import ClipText, ClipTextConfig, Tokenizer
from evaluation.clip_vision import ClipImageConfig, ClipVision, ClipVisionConfig, image_config_of, prepare, read_towers
from fid import crop_then_resize
from support.captions import read_coco, read_prompts
from support.devices import choose_device, rank_and_world
from support.errors import InputError, Parser, count, one_line_errors, positive_int
from support.folders import find_tensors
from support.images import find_images, read_image, settings_of_png, to_rgb
from support.layouts import as_stored
from support.scoring import add_up, check_left_out, read_ahead, settings_of_run
from support.weights import assign, build, read_config


@dataclass
class Convention:
    """What a paper means by "CLIP score"."""

    prefix: str  # before the prompt
    scale: int  # times the cosine
    crop: Callable[[Image.Image], Image.Image]  # before CLIP's own preparation of images


CONVENTIONS = {
    "logits": Convention("", 100, lambda image: image),  # as `logits_per_image` of published CLIPs: temperature 1/100
    # Hessel et al. 2021, but neither weighted by 2.5 nor cut off at 0; images as in GigaGAN and DMD2
    "prefix": Convention("A photo depicts ", 1, partial(crop_then_resize, size=256)),
}


# ---------------------------------------------------------------- both towers

# What a CLIP folder's text_config may leave out: ViT-B/32's sizes, while the text encoder of SD1.5 is ViT-L/14's.
TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}


class ClipScore:
    """A CLIP whose towers, tokenizer and preparation of images come from one folder. Made by `ClipScore.load`."""

    def __init__(
        self, text: ClipText, vision: ClipVision, tokenizer: Tokenizer, image_config: ClipImageConfig, name: str
    ):
        self.text, self.vision, self.tokenizer, self.image_config = text, vision, tokenizer, image_config
        cfg = vision.cfg  # a folder's name may be anything
        self.name = f"{name} ({cfg.num_hidden_layers} layers of {cfg.hidden_size}, patches of {cfg.patch_size} pixels)"

    @classmethod
    def load(
        cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ClipScore":
        """Load a CLIP folder of the usual layout, of any size; frozen and in eval mode. Raises InputError.

        It holds `config.json`, `model.safetensors` (or shards with an index), the tokenizer's files, and
        `preprocessor_config.json`, without which CLIP's own preparation is used.
        """
        folder, where = Path(folder), f"{folder}: config.json"
        text_settings, vision_settings = read_towers(folder)
        text_settings = TEXT_DEFAULTS | text_settings | {"architectures": ["CLIPTextModelWithProjection"]}
        text = build(ClipText, read_config(ClipTextConfig, text_settings, where))
        vision = build(ClipVision, read_config(ClipVisionConfig, vision_settings, where))

        both = nn.ModuleDict({"text": text, "vision": vision})  # at once: each tensor must be of the one or the other
        files = find_tensors(folder, "model", dtype)
        files.pop("logit_scale", None)  # the temperature, which matters in training only
        sources = {key: (key.partition(".")[2], as_stored) for key in both.state_dict()}
        assign(both, sources, files, device, dtype, str(folder))

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
        weight = self.vision.visual_projection.weight
        return self.vision(images.to(weight.device, weight.dtype))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Prompts -> embeddings (B, D), not normalized. What is beyond 77 tokens is cut off, with a notice."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of strings, not one string")
        return self.text(self.tokenizer(prompts).to(self.text.text_projection.weight.device))[2]

    def similarity(self, images: Sequence[Image.Image | np.ndarray] | Tensor, prompts: list[str]) -> Tensor:
        """The cosine, from -1 to 1, between each image and its own prompt: (B,) fp32."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images cannot be compared with {len(prompts)} prompts one by one")
        return F.cosine_similarity(self.image_features(images).float(), self.text_features(prompts).float())

    def score(self, images: Sequence[Image.Image], prompts: list[str], convention: str) -> Tensor:
        """CLIP score of each RGB image (B,), by one of CONVENTIONS; a set of images has the mean of theirs."""
        how = CONVENTIONS[convention]
        images = [how.crop(to_rgb(image, on_white=True)) for image in images]
        return how.scale * self.similarity(images, [how.prefix + prompt for prompt in prompts])


# ---------------------------------------------------------------- a folder of images


def find_prompts(files: list[Path], source: Path | None) -> list[str]:
    """The prompt of each image. Raises InputError where it is not certain.

    Images of sample.py hold their own. Others are found in `source` by their names in a COCO captions JSON, or by the
    numbers that their names end in: an image id there, or the number of a line, from 0.
    """
    own = [settings_of_png(file) for file in files]
    if source is None:
        if missing := [file for file, settings in zip(files, own) if "prompt" not in settings]:
            raise InputError(f"{missing[0]} does not hold its prompt, as images of sample.py do; give --prompts")
        return [settings["prompt"] for settings in own]
    is_json = source.suffix.lower() == ".json"
    if is_json:
        captions, names = read_coco(source)
        known = {int(i) if str(i).isdecimal() else i: texts[0] for i, texts in captions.items()}
        known |= {Path(names[i]).stem: texts[0] for i, texts in captions.items() if i in names}
        lines = [texts[0] for texts in captions.values()]
    else:
        lines = read_prompts(source)
        known = dict(enumerate(lines))
    if any(own):
        asked = {str(i): prompt for i, prompt in enumerate(lines)}
        for file, settings in zip(files, own):
            if not settings or asked.get(settings.get("index")) != settings.get("prompt"):
                raise InputError(f"{file} was not made of the prompt that {source} has for it; leave out --prompts")
        return [settings["prompt"] for settings in own]
    found, prefixes = {}, set()
    for file in files:
        prefix, number = re.fullmatch("(.*?)([0-9]*)", file.stem, re.DOTALL).groups()
        key = file.stem if file.stem in known else int(number or -1)
        prefixes.add(prefix)
        if key not in known or not is_json and len(prefixes) > 1:
            raise InputError(f"{source} has no prompt for {file}; names should end in the number of a line, from 0")
        if key in found:
            raise InputError(f"{found[key]} and {file} have one number, so one prompt of {source}; keep one")
        found[key] = file
    if not is_json:
        check_left_out(len(lines) - len(files), len(lines), files[0].parent, f"of the prompts in {source} are missing")
    return [known[key] for key in found]


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
    if not math.isfinite(total):
        raise InputError(f"{args.clip}: the scores are not finite; are the weights damaged?")
    if rank == 0:
        told = f'"{how.prefix}" + prompt' if how.prefix else "prompt"
        what = f"{how.scale} x cosine(image, {told})" if how.scale != 1 else f"cosine(image, {told})"
        print(f"CLIP score {total / count:.4f}: mean of {what} over {int(count)} images, by {clip.name}")


def main() -> None:
    parser = Parser(description="How well do images fit their prompts? The CLIP score.")
    parser.add_argument("images", type=Path, help="folder of images")
    prompts = "a prompt per line, or a COCO captions JSON; default: each PNG's own prompt"
    parser.add_argument("--prompts", type=Path, help=prompts)
    parser.add_argument("--clip", type=Path, required=True, help="CLIP folder")
    convention = 'logits (default): 100 x cosine; prefix: raw cosine, with "A photo depicts " before the prompt'
    parser.add_argument("--convention", choices=CONVENTIONS, default="logits", help=convention)
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images looked at at once")
    parser.add_argument("--workers", type=count, default=4, help="threads that read images")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    with one_line_errors(parser):
        run(parser.parse_args())


if __name__ == "__main__":
    main()
