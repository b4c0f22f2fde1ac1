"""The autoencoder: pictures <-> latents, 8 times smaller on each side (Kingma & Welling 2014; Rombach et al. 2022).

Diffusion at full resolution is dear, so Stable Diffusion works on latents. The encoder gives a mean and a variance
for every latent number, the decoder turns latents back into a picture. Both are trained once, then frozen.

Shapes: B batch, 3 colors, C channels, H W height and width of the picture, h w = H/8 W/8 those of the latents.
Attribute names equal the keys of the official weights. Read `unet.py` before this file, `model.py` after it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import ResnetBlock, Upsample, silu


@dataclass
class VAEConfig:
    """The fields of `vae/config.json` that we read; the defaults are those a config file may leave out."""

    block_out_channels: list[int]  # one entry per resolution, finest first
    down_block_types: list[str] = field(default_factory=list)
    up_block_types: list[str] = field(default_factory=list)
    layers_per_block: int = 2
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # brings the latents to about unit variance before diffusion
    force_upcast: bool = False  # its activations overflow float16: keep this network in float32
    sample_size: int | list[int] = 512

    # What a config may say, beside the fields above and null: other values would need code that is not here.
    ONLY: ClassVar[dict[str, object]] = {
        "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
        "act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True,
    }  # fmt: skip


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
        """Pictures (B, 3, H, W) in [-1, 1] -> mean and log-variance of their latents, (B, 4, h, w) each, unscaled."""
        mean, log_variance = self.quant_conv(self.encoder(in_memory_order(images))).contiguous().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # beyond that, exp() is 0 or overflows

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, 4, h, w) -> pictures (B, 3, 8 h, 8 w), in about [-1, 1]. See also `decode_in_bands`."""
        return self.decoder(self.post_quant_conv(in_memory_order(latents)))


def memory_order(device: torch.device) -> torch.memory_format:
    """On a CPU, the channels of a pixel side by side in memory: all layers then keep that order, in which its
    convolutions are faster by a tenth (512 pixels) to two fifths (the miniature)."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def in_memory_order(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_order(x.device))


# ---- Decoding in less memory ----------------------------------------------------------------------------------------

# At 1024 pixels one feature map of the decoder's last level takes up to 1 GiB in fp32, and a residual block holds
# several: its input, that normalized, and whatever a convolution needs for its work. But a convolution looks no further
# than one row up and down, so what is not passed on needs to exist for a band of rows only: 2.1 GiB at the peak instead
# of 3.0, measured on a CPU. Decoding tiles of the picture one by one would leave seams, since each would be normalized
# by its own mean and variance. Here these are taken from the whole first, so that the picture is the same.


@torch.no_grad()
def decode_in_bands(vae: VAE, latents: Tensor, rows: int = 64) -> Tensor:
    """What `VAE.decode` makes of latents (B, 4, h, w), each layer so many rows of its input at a time."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(in_memory_order(latents))))
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = resnet_in_bands(layer, x, rows)
        for layer in block.upsamplers:
            x = convolve_in_bands(layer.conv, x, rows, lambda band: F.interpolate(band, scale_factor=2.0))
    return convolve_in_bands(decoder.conv_out, x, rows, normalize(decoder.conv_norm_out, x, rows))


def resnet_in_bands(block: ResnetBlock, x: Tensor, rows: int) -> Tensor:
    h = convolve_in_bands(block.conv1, x, rows, normalize(block.norm1, x, rows))
    h = convolve_in_bands(block.conv2, h, rows, normalize(block.norm2, h, rows))
    for band, shortcut in zip(h.split(rows, dim=2), x.split(rows, dim=2)):
        band += shortcut if block.conv_shortcut is None else block.conv_shortcut(shortcut)
    return h


def convolve_in_bands(conv: nn.Conv2d, x: Tensor, rows: int, before: Callable[[Tensor], Tensor]) -> Tensor:
    """conv(before(x)), (B, C, H, W) -> (B, C', f H, f W), of a 3x3 convolution; `before` makes f x f pixels of each."""
    out = None
    for top in range(0, x.shape[2], rows):
        first, bottom = max(top - 1, 0), min(top + rows, x.shape[2])
        made = conv(before(x[:, :, first : bottom + 1]))  # one row more on each side, which only its neighbors need
        f = made.shape[3] // x.shape[3]
        if out is None:
            shape = len(x), made.shape[1], f * x.shape[2], f * x.shape[3]
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_order(x.device))
        out[:, :, f * top : f * bottom] = made[:, :, f * (top - first) : f * (bottom - first)]
    return out


def normalize(norm: nn.GroupNorm, x: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """silu(norm(x)), as a function for bands of x: mean and variance are taken from all of x, here and now."""
    groups, count, mean, square = norm.num_groups, x[0].numel() // norm.num_groups, 0, 0
    for band in x.split(rows, dim=2):
        band = band.float().unflatten(1, (groups, -1))  # (B, groups, C / groups, rows, W)
        mean, square = mean + band.sum((2, 3, 4)) / count, square + band.square().sum((2, 3, 4)) / count
    deviation = (square - mean.square() + norm.eps).sqrt()
    weight, bias = (part.float().unflatten(0, (groups, -1)) for part in (norm.weight, norm.bias))
    scale = weight / deviation[:, :, None]
    shift = bias - mean[:, :, None] * scale
    scale, shift = (part.flatten(1)[:, :, None, None] for part in (scale, shift))
    return lambda band: silu(torch.addcmul(shift, band.float(), scale).to(band.dtype))
