"""Decoding an image in less memory, a band of rows at a time: the same image, without seams.

At 1024 pixels one feature map of the VAE decoder's last level takes up to 1 GiB in fp32, and a residual block holds
several. But a convolution looks only one row up and down, so most of them need to exist for a band of rows only: 2.1
GiB at the peak instead of 3.0, measured on a CPU. Decoding tiles of the image one by one would leave seams, since each
tile would be normalized by its own mean and variance. Here these are taken from the whole image first.

Shapes: B batch, C channels, H W height and width of a feature map, h w those of the latents.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def decode_in_bands(vae: nn.Module, latents: Tensor, rows: int = 64) -> Tensor:
    """Equals `VAE.decode` of latents (B, 4, h, w); each layer sees `rows` rows of its input at a time."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = resnet_in_bands(layer, x, rows)
        for layer in block.upsamplers:
            x = convolve_in_bands(layer.conv, x, rows, lambda band: F.interpolate(band, scale_factor=2.0))
    return convolve_in_bands(decoder.conv_out, x, rows, normalize(decoder.conv_norm_out, x))


def resnet_in_bands(block: nn.Module, x: Tensor, rows: int) -> Tensor:
    h = convolve_in_bands(block.conv1, x, rows, normalize(block.norm1, x))
    h = convolve_in_bands(block.conv2, h, rows, normalize(block.norm2, h))
    for band, shortcut in zip(h.split(rows, dim=2), x.split(rows, dim=2)):
        band += shortcut if block.conv_shortcut is None else block.conv_shortcut(shortcut)
    return h


def convolve_in_bands(conv: nn.Conv2d, x: Tensor, rows: int, before: Callable[[Tensor], Tensor]) -> Tensor:
    """conv(before(x)) of a 3x3 convolution; `before` makes f x f pixels of each: (B, C, H, W) -> (B, C', f H, f W)."""
    out = None
    for top in range(0, x.shape[2], rows):
        first, bottom = max(top - 1, 0), min(top + rows, x.shape[2])
        made = conv(before(x[:, :, first : bottom + 1]))  # one row more on each side, which only its neighbors need
        f = made.shape[3] // x.shape[3]
        if out is None:
            out = made.new_empty(len(x), made.shape[1], f * x.shape[2], f * x.shape[3])
            out = out.contiguous(memory_format=torch.channels_last) if made.device.type == "cpu" else out
        out[:, :, f * top : f * bottom] = made[:, :, f * (top - first) : f * (bottom - first)]
    return out


def normalize(norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
    """silu(norm(x)), as a function for bands of x: mean and variance are taken from all of x, here and now."""
    groups = x.float().unflatten(1, (norm.num_groups, -1))  # (B, groups, C / groups, H, W)
    variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
    each = norm.num_channels // norm.num_groups
    scale = norm.weight.float() / (variance + norm.eps).sqrt().repeat_interleave(each, dim=1)  # (B, C)
    shift = norm.bias.float() - mean.repeat_interleave(each, dim=1) * scale
    scale, shift = scale[:, :, None, None], shift[:, :, None, None]
    return lambda band: F.silu(torch.addcmul(shift, band.float(), scale).to(band.dtype), inplace=True)
