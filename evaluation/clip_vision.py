"""CLIP's vision tower (Radford et al. 2021), the settings in a CLIP folder, and the way from an image to what it sees.

Its layers are those of the text tower, `clip_text.py`. Attribute names equal the keys of CLIP's weights.

Shapes: B batch, P patches, D width. H W height and width, S that of the square the tower sees, all in pixels.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clip_text import ClipTextConfig, Encoder, embedding
from support.errors import InputError
from support.files import read_json
from support.images import to_rgb
from support.weights import read_config


@dataclass
class ClipVisionConfig:
    """The fields of `vision_config` in a CLIP folder's `config.json` that we read, with their defaults."""

    hidden_size: int = 768  # D
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # S
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    ONLY: ClassVar[dict[str, object]] = {"hidden_act": ("quick_gelu", "gelu")}  # see support/checks.py


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
        """Normalized images (B, 3, S, S) -> embeddings (B, projection_dim), not normalized."""
        return self.visual_projection(self.features(images)[:, 0])

    def features(self, images: Tensor) -> Tensor:
        """What is seen in the image as a whole and in each patch: (B, 1 + P, D)."""
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(images))
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return self.vision_model.post_layernorm(x)


# ---- A CLIP folder's JSON files, as OpenAI, OpenCLIP and versions of transformers have written them ----

PUBLISHED = "openai/clip-vit-large-patch14 and laion/CLIP-ViT-g-14-laion2B-s12B-b42K on the Hugging Face hub are some"


@dataclass
class ClipImageConfig:
    """The fields of a CLIP folder's `preprocessor_config.json` that we read; the defaults are CLIP's own."""

    size: int | dict = 224  # of the short side; in newer files {"shortest_edge": 224}
    crop_size: int | dict = 224  # of the square that the network sees; in newer files {"height": 224, "width": 224}
    resample: int = 3  # pillow's number for bicubic
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    ONLY: ClassVar[dict[str, object]] = {  # see support/checks.py
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
        "do_pad": False, "use_square_size": False,
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


def read_known(config_class: type, settings: dict, where: str):
    """Settings as `config_class`. Those that it does not name change nothing here, and nothing in transformers."""
    names = {field.name for field in dataclasses.fields(config_class)} | getattr(config_class, "ONLY", {}).keys()
    return read_config(config_class, {name: settings[name] for name in names & settings.keys()}, where)


def image_config_of(folder: Path, side: int) -> ClipImageConfig:
    """How a CLIP folder says that images are prepared, for a vision tower that takes images of `side` pixels."""
    settings = {"size": side, "crop_size": side}
    for name in "processor_config.json", "preprocessor_config.json":  # the first is today's, with all in one
        if (folder / name).is_file():
            settings = read_json(folder / name)
            settings = settings.get("image_processor", settings)
    config = read_known(ClipImageConfig, settings, f"{folder}: preprocessor config")
    if config.crop_size != side:
        sizes = f"images of {config.crop_size} pixels, the vision tower takes {side}"
        raise InputError(f"{folder}: the preprocessor config makes {sizes}")
    return config


# What a CLIP folder's text_config may leave out: ViT-B/32's sizes, while the text encoder of SD1.5 is ViT-L/14's.
TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}


def read_towers(folder: Path) -> tuple[ClipTextConfig, ClipVisionConfig]:
    """The configurations of the text and of the vision tower in a CLIP folder's `config.json`."""
    where = f"{folder}: config.json"
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no CLIP folder: it has no config.json; {PUBLISHED}")
    config = read_json(folder / "config.json")
    # OpenAI's older files have a tower's settings twice, and then the other libraries go by the first of these alone.
    text, vision = (config.get(f"{tower}_config_dict") or config.get(f"{tower}_config") for tower in ("text", "vision"))
    if config.get("model_type") != "clip" or not isinstance(text, dict) or not isinstance(vision, dict):
        raise InputError(f"{where} describes no CLIP: model_type clip, with text_config and vision_config; {PUBLISHED}")
    projection = {"projection_dim": config.get("projection_dim") or 512}  # a tower's own is not used
    text = TEXT_DEFAULTS | text | projection | {"architectures": ["CLIPTextModelWithProjection"]}
    return read_known(ClipTextConfig, text, where), read_known(ClipVisionConfig, vision | projection, where)


def prepare(image: Image.Image | np.ndarray, cfg: ClipImageConfig) -> Tensor:
    """An image of any size and mode, pillow's or uint8 (H, W, 3) -> the middle of it, normalized, (3, S, S) fp32.

    Pillow's bicubic filter widens when it shrinks and rounds to whole levels. Torch's does neither, and it would
    change the score.
    """
    image = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image), on_white=True)
    width, height = (cfg.size * side // min(image.size) for side in image.size)
    left, top = (width - cfg.crop_size) // 2, (height - cfg.crop_size) // 2
    image = image.resize((width, height), cfg.resample)
    image = image.crop((left, top, left + cfg.crop_size, top + cfg.crop_size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (S, S, 3) -> (3, S, S)
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in (cfg.image_mean, cfg.image_std))
    return (pixels - mean) / deviation
