"""The autoencoder: images <-> latents, 8 times smaller on each side (Kingma & Welling 2014; Rombach et al. 2022).

Diffusion at full resolution is expensive, so Stable Diffusion works on latents. The encoder gives a mean and a variance
for every latent number, the decoder turns latents back into an image. Both are trained once, then frozen.

Shapes: B batch, 3 colors, C channels, H W height and width of the image, h w = H/8 W/8 those of the latents.
Attribute names equal the keys of the official weights. Read `unet.py` before this file, `model.py` after it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import ResnetBlock, Upsample, silu


@dataclass
class VAEConfig:
    """The fields of `vae/config.json` that we read; the defaults are those a config file may leave out."""

    block_out_channels: list[int]  # one entry per resolution, finest first
    layers_per_block: int = 2
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # brings the latents to about unit variance before diffusion
    force_upcast: bool = True  # its activations overflow float16: keep this network in float32
    sample_size: int | list[int] = 512


def resnet(cfg: VAEConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, emb_width=0, groups=cfg.norm_num_groups, eps=1e-6)


class Attention(nn.Module):
    """One attention head as wide as the feature map, around a shortcut: every position looks at every other."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h w, C)
        q, k, v = (project(h)[:, None] for project in (self.to_q, self.to_k, self.to_v))  # (B, 1 head, h w, C)
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, h w, C) -> (B, C, h, w)


class MidBlock(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        channels = cfg.block_out_channels[-1]
        self.resnets = nn.ModuleList(resnet(cfg, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, cfg.norm_num_groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and bottom only, unlike the UNet's


class DownBlock(nn.Module):
    def __init__(self, cfg: VAEConfig, in_channels: int, channels: int, last: bool):
        super().__init__()
        inputs = [in_channels] + [channels] * (cfg.layers_per_block - 1)
        self.resnets = nn.ModuleList(resnet(cfg, i, channels) for i in inputs)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, cfg: VAEConfig, in_channels: int, channels: int, last: bool):
        super().__init__()
        inputs = [in_channels] + [channels] * cfg.layers_per_block  # one residual block more than the encoder
        self.resnets = nn.ModuleList(resnet(cfg, i, channels) for i in inputs)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.resnets:
            x = layer(x)
        for upsample in self.upsamplers:
            x = upsample(x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        channels = cfg.block_out_channels
        self.conv_in = nn.Conv2d(cfg.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(cfg, i, o, last=level == len(channels) - 1)
            for level, (i, o) in enumerate(zip([channels[0], *channels], channels))
        )
        self.mid_block = MidBlock(cfg)
        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        channels = cfg.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(cfg.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(cfg)
        self.up_blocks = nn.ModuleList(
            UpBlock(cfg, i, o, last=level == len(channels) - 1)
            for level, (i, o) in enumerate(zip([channels[0], *channels], channels))
        )
        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], cfg.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance of their latents, (B, 4, h, w) each, unscaled."""
        mean, log_variance = self.quant_conv(self.encoder(in_memory_order(images))).contiguous().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # beyond that, exp() is 0 or overflows

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, 4, h, w) -> images (B, 3, 8 h, 8 w), in about [-1, 1]. See also `support/bands.py`."""
        return self.decoder(self.post_quant_conv(in_memory_order(latents)))


def in_memory_order(x: Tensor) -> Tensor:
    """On a CPU, the channels of a pixel side by side in memory: all layers then keep that order, in which its
    convolutions are faster by a tenth (512 pixels) to two fifths (the miniature)."""
    return x.contiguous(memory_format=torch.channels_last if x.device.type == "cpu" else torch.contiguous_format)
