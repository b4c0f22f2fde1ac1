"""CLIP score: how well do images fit their prompts? (Radford et al. 2021; Hessel et al. 2021)

    python clip_score.py IMAGES --clip weights/miniature-clip                    prompts from the PNGs of sample.py
    torchrun --nproc-per-node 8 clip_score.py IMAGES --prompts captions_val2014.json --clip DIR --convention prefix

CLIP's two towers map an image and a text to vectors of one space; the score is the cosine between the two. The text
tower is that of `clip_text.py`, the vision tower and the way images reach it are here. A model is a CLIP folder as
the Hugging Face hub has them. Attribute names equal the keys of its weights.

Shapes: B batch, P patches, D width. H W height and width, S that of the square the vision tower sees, all in pixels.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from clip_text import ClipText, ClipTextConfig, Encoder, Tokenizer, embedding
from support.captions import read_prompts
from support.devices import choose_device, rank_and_world
from support.errors import InputError, one_line_errors
from support.files import listed, read_json
from support.folders import find_tensors
from support.images import on_white
from support.layouts import as_stored
from support.weights import assign, build, read_config

PUBLISHED = "openai/clip-vit-large-patch14 and laion/CLIP-ViT-g-14-laion2B-s12B-b42K on the Hugging Face hub are some"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# What the published figures called "CLIP score" are: (said before the prompt, times the cosine).
CONVENTIONS = {
    "logits": ("", 100),  # `logits_per_image` of the published CLIPs, whose temperature has come to its bound, 1/100
    "prefix": ("A photo depicts ", 1),  # Hessel et al. 2021, but neither weighted by 2.5 nor cut off at 0
}


# ---------------------------------------------------------------- the vision tower


@dataclass
class ClipVisionConfig:
    """The fields of `vision_config` in a CLIP folder's `config.json` that we read, with their defaults."""

    hidden_size: int = 768  # D
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    ONLY: ClassVar[dict[str, object]] = {  # see ClipTextConfig
        "hidden_act": ("quick_gelu", "gelu"),
        "attention_dropout": 0.0, "dropout": 0.0, "model_type": "clip_vision_model", "num_channels": 3,
        "initializer_factor": ..., "initializer_range": ..., "torch_dtype": ..., "dtype": ...,
        "transformers_version": ..., "architectures": ...,
    }  # fmt: skip


class VisionEmbeddings(nn.Module):
    """A vector for every patch of the image and one for the image as a whole, plus a vector for every place."""

    def __init__(self, cfg: ClipVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(cfg.hidden_size) * cfg.hidden_size**-0.5)
        self.patch_embedding = nn.Conv2d(3, cfg.hidden_size, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.position_embedding = embedding((cfg.image_size // cfg.patch_size) ** 2 + 1, cfg.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, 3, H, W) -> (B, P, D)
        whole = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight  # (B, 1 + P, D)


class VisionTransformer(nn.Module):
    def __init__(self, cfg: ClipVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(cfg)
        self.pre_layrnorm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)  # spelled so in the checkpoints
        self.encoder = Encoder(cfg, causal=False)
        self.post_layernorm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)


class ClipVision(nn.Module):
    def __init__(self, cfg: ClipVisionConfig):
        super().__init__()
        self.cfg = cfg
        self.vision_model = VisionTransformer(cfg)
        self.visual_projection = nn.Linear(cfg.hidden_size, cfg.projection_dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) of the configured size -> embeddings (B, projection_dim), not normalized."""
        return self.visual_projection(self.features(images)[:, 0])

    def features(self, images: Tensor) -> Tensor:
        """What is seen in the image as a whole and in each patch: (B, 1 + P, D)."""
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(images))
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return self.vision_model.post_layernorm(x)


# ---------------------------------------------------------------- from an image to what the tower sees


@dataclass
class ClipImageConfig:
    """The fields of a CLIP folder's `preprocessor_config.json` that we read; the defaults are CLIP's own."""

    size: int = 224  # of the short side; in newer files {"shortest_edge": 224}
    crop_size: int = 224  # S; in newer files {"height": 224, "width": 224}
    resample: int = 3  # pillow's number for bicubic
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    ONLY: ClassVar[dict[str, object]] = {  # see ClipTextConfig
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
        "do_convert_rgb": ..., "image_processor_type": ..., "feature_extractor_type": ..., "processor_class": ...,
        "data_format": ...,
    }  # fmt: skip

    def __post_init__(self):
        if isinstance(self.size, dict):
            self.size = self.size.get("shortest_edge")
        if isinstance(self.crop_size, dict) and self.crop_size.get("height") == self.crop_size.get("width"):
            self.crop_size = self.crop_size.get("height")
        if not (isinstance(self.size, int) and isinstance(self.crop_size, int) and 0 < self.crop_size <= self.size):
            raise ValueError("size must be that of the shortest edge, and crop_size a square within it")
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError("image_mean and image_std must be three numbers, for red, green and blue")
        self.resample = Image.Resampling(self.resample)


def prepare(image: Image.Image, cfg: ClipImageConfig) -> Tensor:
    """An image of any size and mode -> the middle of it, normalized, (3, S, S) fp32.

    Pillow's bicubic filter widens when it shrinks and rounds to whole levels. Torch's does neither, and it would
    change the score.
    """
    image = on_white(image)
    width, height = (cfg.size * side // min(image.size) for side in image.size)
    left, top = (width - cfg.crop_size) // 2, (height - cfg.crop_size) // 2
    image = image.resize((width, height), cfg.resample)
    image = image.crop((left, top, left + cfg.crop_size, top + cfg.crop_size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (S, S, 3) -> (3, S, S)
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in (cfg.image_mean, cfg.image_std))
    return (pixels - mean) / deviation


# ---------------------------------------------------------------- both towers


# Until 2023, every config.json held the settings that all kinds of models had in common. CLIP reads none of these.
COMMON = set(
    """chunk_size_feed_forward diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size id2label label2id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores problem_type remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings top_k top_p
    torchscript typical_p use_bfloat16""".split()
)
# These, too, as long as they ask for nothing.
ABSENT = {"add_cross_attention", "is_decoder", "is_encoder_decoder", "pruned_heads"}
# What a CLIP folder's text_config may leave out: ViT-B/32's sizes, while the text encoder of SD1.5 is ViT-L/14's.
TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}


def tower_settings(config: dict, tower: str, where: str) -> dict:
    """The settings of one tower ("text" or "vision") in a CLIP folder's `config.json`."""
    # OpenAI's older files have them twice, and then the other libraries go by this one alone.
    settings = config.get(f"{tower}_config_dict")
    settings = config.get(f"{tower}_config") if settings is None else settings
    if config.get("model_type") != "clip" or not isinstance(settings, dict):
        raise InputError(f"{where} describes no CLIP: model_type clip, with text_config and vision_config; {PUBLISHED}")
    empty = {name for name in ABSENT if not settings.get(name)}
    settings = {name: value for name, value in settings.items() if name not in COMMON | empty}
    return settings | {"projection_dim": config.get("projection_dim") or 512}  # a tower's own is not used


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
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} is no CLIP folder: it has no config.json; {PUBLISHED}")
        where = f"{folder}: config.json"
        config = read_json(folder / "config.json")
        text_settings = TEXT_DEFAULTS | tower_settings(config, "text", where)
        text_settings["architectures"] = ["CLIPTextModelWithProjection"]
        text = build(ClipText, read_config(ClipTextConfig, text_settings, where))
        vision_settings = tower_settings(config, "vision", where)
        vision = build(ClipVision, read_config(ClipVisionConfig, vision_settings, where))

        both = nn.ModuleDict({"text": text, "vision": vision})  # at once: each tensor must be of the one or the other
        files = find_tensors(folder, "model", dtype)
        files.pop("logit_scale", None)  # the temperature, which matters in training only
        sources = {key: (key.partition(".")[2], as_stored) for key in both.state_dict()}
        assign(both, sources, files, device, dtype, str(folder))

        try:
            tokenizer = Tokenizer.load(folder)
        except (OSError, ValueError) as error:
            raise InputError(str(error)) from None
        tokens, rows = tokenizer.bpe.get_vocab_size(), text.cfg.vocab_size
        if tokens != rows:  # its ids would be other words to the text tower
            raise InputError(f"{folder}: the tokenizer knows {tokens} tokens, the text tower {rows}; they do not fit")
        tokenizer.length = text.cfg.max_position_embeddings
        return cls(text, vision, tokenizer, read_image_config(folder, vision.cfg), folder.resolve().name)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image] | np.ndarray) -> Tensor:
        """Images, pillow's of any sizes or uint8 (B, H, W, 3), -> embeddings (B, D), not normalized."""
        images = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
        weight = self.vision.visual_projection.weight
        pixels = torch.stack([prepare(image, self.image_config) for image in images])  # (B, 3, S, S)
        return self.vision(pixels.to(weight.device, weight.dtype))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Prompts -> embeddings (B, D), not normalized. What is beyond 77 tokens is cut off, with a notice."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of strings, not one string")
        return self.text(self.tokenizer(prompts).to(self.text.text_projection.weight.device))[2]

    def similarity(self, images: Sequence[Image.Image] | np.ndarray, prompts: list[str]) -> Tensor:
        """The cosine, from -1 to 1, between each image and its own prompt: (B,) fp32."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images cannot be compared with {len(prompts)} prompts one by one")
        return F.cosine_similarity(self.image_features(images).float(), self.text_features(prompts).float())

    def score(self, images: Sequence[Image.Image] | np.ndarray, prompts: list[str], convention: str) -> Tensor:
        """CLIP score of each image (B,), by one of CONVENTIONS; a set of images has the mean of theirs."""
        prefix, scale = CONVENTIONS[convention]
        return scale * self.similarity(images, [prefix + prompt for prompt in prompts])


def read_image_config(folder: Path, vision: ClipVisionConfig) -> ClipImageConfig:
    settings = {"size": vision.image_size, "crop_size": vision.image_size}
    for name in "processor_config.json", "preprocessor_config.json":  # the first is today's, with all in one
        if (folder / name).is_file():
            settings = read_json(folder / name)
            settings = settings.get("image_processor", settings)
    config = read_config(ClipImageConfig, settings, f"{folder}: preprocessor config")
    if config.crop_size != vision.image_size:
        sizes = f"images of {config.crop_size} pixels, the vision tower takes {vision.image_size}"
        raise InputError(f"{folder}: the preprocessor config makes {sizes}")
    return config


# ---------------------------------------------------------------- a folder of images


def find_images(folder: Path) -> list[Path]:
    """All images in a folder and those within it, in the order of their names, with numbers in them by value."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one of images")
    files = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    files = [file for file in files if file.name != "sheet.png"]  # sample.py's, with all the others on it
    if not files:
        raise InputError(f"{folder} holds no images ({', '.join(SUFFIXES)})")

    def order(file: Path) -> tuple[list, Path]:
        parts = re.split("([0-9]+)", file.relative_to(folder).as_posix())  # text, number, text, number, ..., text
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], file

    return sorted(files, key=order)


def read_image(file: Path) -> tuple[Image.Image, str | None]:
    """An image, and the prompt in its text chunk, if it has one."""
    with Image.open(file) as image:
        image.load()
        return image, getattr(image, "text", {}).get("prompt")


def run(args: argparse.Namespace) -> None:
    rank, world = rank_and_world()
    if args.batch_size < 1:
        raise InputError("--batch-size must be at least 1")
    files = find_images(args.images)
    prompts = read_prompts(args.prompts) if args.prompts else None
    if prompts and len(prompts) != len(files):
        raise InputError(
            f"{args.prompts} holds {len(prompts)} prompts, {args.images} {len(files)} images; it takes one for each, "
            "in the order of the images' names"
        )
    device = choose_device(args.device)
    clip = ClipScore.load(args.clip, device)

    # Of each image its score, and whether it could be read. Added up in one order however the work was shared.
    scores, readable = table = torch.zeros(2, len(files), dtype=torch.float64)
    mine = range(rank, len(files), world)
    for few in tqdm([mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)], disable=rank > 0):
        images, told = [], []
        for i in few:
            try:
                image, prompt = read_image(files[i])
            except Exception:  # pillow has many ways to say that a file is damaged
                continue
            prompt = prompts[i] if prompts else prompt
            if prompt is None:
                raise InputError(f"{files[i]} does not say its prompt, as images of sample.py do; give --prompts")
            images.append(image)
            told.append(prompt)
            readable[i] = 1
        if images:
            scores[[i for i in few if readable[i]]] = clip.score(images, told, args.convention).double().cpu()
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
        torch.distributed.all_reduce(table)
        torch.distributed.destroy_process_group()

    skipped = [str(file) for file, could in zip(files, readable) if not could]
    if len(skipped) > max(1, len(files) // 100) or len(skipped) == len(files):
        raise InputError(f"{len(skipped)} of {len(files)} images cannot be read ({listed(skipped)}); make them again")
    if rank == 0:
        if skipped:
            names = listed(skipped, 20)
            print(f"notice: {len(skipped)} of {len(files)} images cannot be read: {names}", file=sys.stderr)
        prefix, scale = CONVENTIONS[args.convention]
        told = f'"{prefix}" + prompt' if prefix else "prompt"
        what = f"{scale} x cosine(image, {told})" if scale != 1 else f"cosine(image, {told})"
        mean, count = (scores.sum() / readable.sum()).item(), int(readable.sum())
        print(f"CLIP score {mean:.4f}: mean of {what} over {count} images, by {clip.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="How well do images fit their prompts? The CLIP score.")
    parser.add_argument("images", type=Path, help="folder of images")
    prompts = "a prompt per line, or a COCO captions JSON, in the order of file names; default: each PNG's own prompt"
    parser.add_argument("--prompts", type=Path, help=prompts)
    parser.add_argument("--clip", type=Path, required=True, help="CLIP folder")
    convention = 'logits (default): 100 x cosine; prefix: raw cosine, with "A photo depicts " before the prompt'
    parser.add_argument("--convention", choices=CONVENTIONS, default="logits", help=convention)
    parser.add_argument("--batch-size", type=int, default=32, help="images looked at at once")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    with one_line_errors(parser):
        run(parser.parse_args())


if __name__ == "__main__":
    main()
