"""CLIP's vision tower (Radford et al. 2021), and the way from an image to what it sees.

Its layers are those of the text tower, `clip_text.py`. Attribute names equal the keys of CLIP's weights.

Shapes: B batch, P patches, D width. H W height and width, S that of the square the tower sees, all in pixels.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clip_text import Encoder, embedding
from support.clip_folder import ClipImageConfig
from support.images import to_rgb


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
        """Normalized images (B, 3, S, S) -> embeddings (B, projection_dim), not normalized."""
        return self.visual_projection(self.features(images)[:, 0])

    def features(self, images: Tensor) -> Tensor:
        """What is seen in the image as a whole and in each patch: (B, 1 + P, D)."""
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(images))
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return self.vision_model.post_layernorm(x)


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
