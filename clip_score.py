"""CLIP's vision tower (Radford et al. 2021): a picture as one vector in the space that captions share.

Attribute names equal the keys of a CLIP folder's weights (`vision_model.*`, `visual_projection`). The layers are those
of the text tower in `clip_text.py`, looking in both directions.

Shapes: B batch, P patches, D width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clip_text import Encoder


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
    """A vector for every patch of the picture and one for the picture as a whole, plus a vector for every place."""

    def __init__(self, cfg: ClipVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(cfg.hidden_size) * cfg.hidden_size**-0.5)
        self.patch_embedding = nn.Conv2d(3, cfg.hidden_size, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.position_embedding = nn.Embedding((cfg.image_size // cfg.patch_size) ** 2 + 1, cfg.hidden_size)

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
        """Normalized pictures (B, 3, H, W) of the configured size -> embeddings (B, projection_dim), not normalized."""
        return self.visual_projection(self.features(images)[:, 0])

    def features(self, images: Tensor) -> Tensor:
        """What is seen in the picture as a whole and in each patch: (B, 1 + P, D)."""
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(images))
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return self.vision_model.post_layernorm(x)
