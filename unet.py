"""The denoiser: one UNet for Stable Diffusion 1.5, SDXL and the miniature.

It looks at a noisy latent, at how noisy it is (timestep) and at the text, and predicts the noise in it (Ho et al. 2020;
Rombach et al. 2022, section 3.3). A model is described by the fields of `UNetConfig`, which are those of the official
`unet/config.json`; attribute names equal the keys of the official weights, so that loading needs no renaming.

Shapes: B batch, C channels, H W latent height and width (1/8 of the image's), L text tokens, D width of the text.
Read `clip_text.py` before this file, `vae.py` after it; the forward pass at the end of this file is the summary.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class UNetConfig:
    """The fields of `unet/config.json` that we read; the defaults are those a config file may leave out.
    Where a field is a list, it has one entry per resolution, finest first."""

    block_out_channels: list[int]
    down_block_types: list[str]
    up_block_types: list[str]
    cross_attention_dim: int  # D
    attention_head_dim: int | list[int] = 8  # despite its name: the *number* of attention heads
    transformer_layers_per_block: int | list[int] = 1
    layers_per_block: int = 2
    in_channels: int = 4
    out_channels: int = 4
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False  # how proj_in and proj_out are stored: Linear, or 1x1 convolution
    addition_embed_type: str | None = None  # "text_time": SDXL's pooled text and image sizes
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    sample_size: int | list[int] = 64  # default H and W of the latents; the network itself takes any size

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name in "attention_head_dim", "transformer_layers_per_block", "down_block_types", "up_block_types":
            value = getattr(self, name)
            if isinstance(value, int):
                setattr(self, name, [value] * levels)
            elif len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries, block_out_channels has {levels}")
        for width, heads in zip(self.block_out_channels, self.attention_head_dim):
            if width % heads:
                raise ValueError(f"block_out_channels: {width} cannot be divided among {heads} heads")


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Numbers t, shape (B,), as points on circles of growing period: cosines first, then sines -> (B, width), fp32.

    The encoding of positions in "Attention is all you need" (Vaswani et al. 2017, section 3.5), applied to time.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x); in place where no backward pass needs x: a large tensor less, a tenth of the VAE's time on CPUs."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Embedding(nn.Module):
    """Two-layer perceptron that turns the sinusoids of a timestep, or SDXL's extra conditions, into one vector."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, a timestep's vector added between them (none in the VAE: width 0)."""

    def __init__(self, in_channels: int, out_channels: int, emb_width: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if emb_width:
            self.time_emb_proj = nn.Linear(emb_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of the image's positions to one another, or to the text (`context_width` given)."""

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected)  # (B, heads, L, width / heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other (Shazeer 2020, "GLU variants improve transformer")."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # Identity: dropout in the official network; it keeps the numbering of the weights.
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Look at the other positions (attn1), look at the text (attn2), think (ff)."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.attn2 = Attention(width, heads, context_width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Feature map -> sequence of positions -> transformer blocks -> feature map, around a shortcut."""

    def __init__(self, cfg: UNetConfig, level: int):
        super().__init__()
        width, heads = cfg.block_out_channels[level], cfg.attention_head_dim[level]
        depth = cfg.transformer_layers_per_block[level]
        self.norm = nn.GroupNorm(cfg.norm_num_groups, width, eps=1e-6)
        projection = nn.Linear if cfg.use_linear_projection else lambda i, o: nn.Conv2d(i, o, 1)
        self.proj_in = projection(width, width)
        blocks = (TransformerBlock(width, heads, cfg.cross_attention_dim) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = projection(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, H, W) -> (B, H W, C)
        # A 1x1 convolution of the map is a linear layer of the sequence: one code for both ways of storing it.
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, H W, C) -> (B, C, H, W)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B, C, H, W) -> (B, C, H/2, W/2)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # (B, C, H, W) -> (B, C, *size)


def resnet(cfg: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, 4 * cfg.block_out_channels[0], cfg.norm_num_groups, cfg.norm_eps)


class DownBlock(nn.Module):
    """One resolution on the way down. Every result is also pushed onto `skips`, for the way up."""

    def __init__(self, cfg: UNetConfig, level: int, in_channels: int):
        super().__init__()
        channels = cfg.block_out_channels[level]
        inputs = [in_channels] + [channels] * (cfg.layers_per_block - 1)
        self.resnets = nn.ModuleList(resnet(cfg, i, channels) for i in inputs)
        attends = cfg.down_block_types[level] == "CrossAttnDownBlock2D"
        self.attentions = nn.ModuleList(Transformer(cfg, level) for _ in inputs if attends)
        self.downsamplers = nn.ModuleList([] if level == len(cfg.block_out_channels) - 1 else [Downsample(channels)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i, block in enumerate(self.resnets):
            x = block(x, emb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """The coarsest resolution: residual block, transformer, residual block."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        channels = cfg.block_out_channels[-1]
        self.resnets = nn.ModuleList(resnet(cfg, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(cfg, level=-1)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """One resolution on the way up. Every residual block also sees the newest entry of `skips`, taken off it."""

    def __init__(self, cfg: UNetConfig, level: int, in_channels: int, skip_channels: list[int]):
        super().__init__()
        channels = cfg.block_out_channels[level]
        inputs = [in_channels] + [channels] * cfg.layers_per_block  # one residual block more than on the way down
        self.resnets = nn.ModuleList(resnet(cfg, i + skip_channels.pop(), channels) for i in inputs)
        attends = cfg.up_block_types[-1 - level] == "CrossAttnUpBlock2D"  # the list runs from coarse to fine
        self.attentions = nn.ModuleList(Transformer(cfg, level) for _ in inputs if attends)
        self.upsamplers = nn.ModuleList([Upsample(channels)] if level > 0 else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i, block in enumerate(self.resnets):
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])  # not always 2 H x 2 W: going down, odd sizes were rounded up
        return x


class UNet(nn.Module):
    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        channels = cfg.block_out_channels
        emb_width = 4 * channels[0]
        self.time_embedding = Embedding(channels[0], emb_width)
        if cfg.addition_embed_type:
            self.add_embedding = Embedding(cfg.projection_class_embeddings_input_dim, emb_width)
        self.conv_in = nn.Conv2d(cfg.in_channels, channels[0], 3, padding=1)
        skip_channels = [channels[0]]  # what the forward pass will find on `skips`
        self.down_blocks = nn.ModuleList()
        for level in range(len(channels)):
            self.down_blocks.append(DownBlock(cfg, level, in_channels=skip_channels[-1]))
            skip_channels += [channels[level]] * (cfg.layers_per_block + len(self.down_blocks[-1].downsamplers))
        self.mid_block = MidBlock(cfg)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            coarser = channels[min(level + 1, len(channels) - 1)]
            self.up_blocks.append(UpBlock(cfg, level, coarser, skip_channels))
        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, channels[0], cfg.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], cfg.out_channels, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None
    ) -> Tensor:
        """Predict the noise in latents x (B, 4, H, W) at timesteps t (B,), on the network's own scale 0..1000.

        context: the text (B, L, D). SDXL only: pooled text (B, 1280) and time_ids (B, 6) = original height, width, crop
        top, left, target height, width, in pixels.
        """
        emb = self.time_embedding(sinusoids(t, self.cfg.block_out_channels[0]))  # (B, 4 C)
        if self.cfg.addition_embed_type:
            if pooled is None or time_ids is None:
                raise ValueError("this UNet (addition_embed_type 'text_time') also needs pooled and time_ids")
            sizes = sinusoids(time_ids.flatten(), self.cfg.addition_time_embed_dim).view(len(t), -1)
            emb = emb + self.add_embedding(torch.cat([pooled, sizes.to(pooled.dtype)], dim=-1))
        emb = silu(emb)  # once for all residual blocks
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, context, skips)
        x = self.mid_block(x, emb, context)
        for block in self.up_blocks:
            x = block(x, emb, context, skips)
        return self.conv_out(silu(self.conv_norm_out(x)))


RECOMPUTED = ResnetBlock, Transformer


def checkpoint_activations(unet: nn.Module) -> None:
    """Gradient checkpointing: keep only the inputs of each block, and compute the rest again in the backward pass."""
    for module in unet.modules():
        if isinstance(module, RECOMPUTED):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
