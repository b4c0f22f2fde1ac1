"""How close are our networks to those of diffusers and transformers, at the official configurations?

    PYTHONPATH=. python tests/parity.py            all but SDXL's two large networks
    PYTHONPATH=. python tests/parity.py --full     SDXL's UNet (10 GB) and second text encoder as well

The reference gets random weights in which every tensor matters (`helpers.randomize`), ours takes the very same tensors,
both see the same input. The error is the largest difference, relative to the largest value of the reference.
"""

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable, Iterator

import diffusers
import torch
import transformers
from diffusers.models import attention, embeddings, resnet
from diffusers.models import transformers as blocks
from helpers import randomize
from torch import Tensor, nn

import unet
from clip_text import ClipText, ClipTextConfig
from support import layouts
from support.weights import build, read_config
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

SD15, SDXL = layouts.SD15, layouts.SDXL
Row = tuple[str, str, Callable[[], tuple[Tensor, Tensor]], float]  # module, configuration, run -> (ours, theirs), bound


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def share(ours: nn.Module, theirs: nn.Module, rename=lambda key: key) -> nn.Module:
    """Give our network, built without weights, the reference's tensors themselves."""
    ours.load_state_dict({rename(key): w for key, w in theirs.state_dict().items()}, strict=True, assign=True)
    for name, module in theirs.named_modules():  # inputs of ordinary size would not show a wrong eps
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            assert ours.get_submodule(rename(name)).eps == module.eps, name
    return ours.eval().requires_grad_(False)


def on_meta(network_class: type, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return network_class(*args, **kwargs)


def ours(network_class: type, config_class: type, settings: dict) -> nn.Module:
    return build(network_class, read_config(config_class, settings, "config"))


def without_class(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if not name.startswith("_")}


# ---- small pieces, at the widths they have in SD1.5 ----


def run_sinusoids():
    t = torch.tensor([0, 1, 17, 500, 999])
    reference = embeddings.Timesteps(320, flip_sin_to_cos=True, downscale_freq_shift=0)
    return unet.sinusoids(t, 320), reference(t)


def run_resnet():
    theirs = resnet.ResnetBlock2D(in_channels=640, out_channels=320, temb_channels=1280, eps=1e-5)
    mine = share(on_meta(unet.ResnetBlock, 640, 320, 1280, 32, 1e-5), randomize(theirs, 0))
    x, emb = draw(2, 640, 16, 16), draw(2, 1280, seed=2)
    return mine(x, torch.nn.functional.silu(emb)), theirs(x, emb)


def run_transformer(family: dict, level: int, heads: int, depth: int):
    cfg = read_config(UNetConfig, family["unet"], "unet")
    width = cfg.block_out_channels[level]
    theirs = blocks.Transformer2DModel(
        heads, width // heads, width, num_layers=depth, cross_attention_dim=cfg.cross_attention_dim,
        use_linear_projection=cfg.use_linear_projection,
    )  # fmt: skip
    cfg.transformer_layers_per_block[level] = depth
    mine = share(on_meta(unet.Transformer, cfg, level), randomize(theirs, 0))
    x, text = draw(2, width, 16, 16), draw(2, 77, cfg.cross_attention_dim, seed=2)
    return mine(x, text), theirs(x, encoder_hidden_states=text).sample


def run_feed_forward():
    theirs = randomize(attention.FeedForward(320, activation_fn="geglu"), 0)
    mine = share(on_meta(unet.FeedForward, 320), theirs)
    x = draw(2, 64, 320)
    return mine(x), theirs(x)


# ---- whole networks ----


@functools.lru_cache(maxsize=1)  # drawing the weights takes longer than running the network
def random_unet(settings: str) -> nn.Module:
    network = on_meta(diffusers.UNet2DConditionModel, **without_class(json.loads(settings)))
    return randomize(network.to_empty(device="cpu"), 0)


def run_unet(settings: dict, size: int, dtype: torch.dtype = torch.float32):
    theirs = random_unet(json.dumps(settings))
    if dtype != torch.float32:
        theirs = copy.deepcopy(theirs).to(dtype)
    mine = share(ours(UNet, UNetConfig, settings), theirs)
    x, t = draw(2, 4, size, size).to(dtype), torch.tensor([999, 17])
    text, extra, added = draw(2, 77, settings["cross_attention_dim"], seed=2).to(dtype), (), None
    if settings.get("addition_embed_type"):
        time_ids = torch.tensor([[1024, 768, 0, 16, 1024, 1024], [512, 512, 8, 0, 1024, 512]])
        pooled = draw(2, settings["projection_class_embeddings_input_dim"] - 6 * 256, seed=3).to(dtype)
        extra, added = (pooled, time_ids), {"text_embeds": pooled, "time_ids": time_ids}
    return mine(x, t, text, *extra), theirs(x, t, text, added_cond_kwargs=added).sample


def run_vae(settings: dict, what: str, dtype: torch.dtype = torch.float32):
    theirs = randomize(diffusers.AutoencoderKL(**without_class(settings)), 0).to(dtype)
    mine = share(ours(VAE, VAEConfig, settings), theirs)
    if what == "encode":
        images = draw(1, 3, 128, 96).clamp(-1, 1).to(dtype)
        return torch.cat(mine.encode(images)), torch.cat(theirs.encode(images).latent_dist.parameters.chunk(2, dim=1))
    # Some CPUs have no fast bf16 convolution for the reference's memory order: minutes, if the image is not small.
    size = (16, 12) if dtype == torch.float32 else (4, 3)
    latents = draw(1, 4, *size).to(dtype)
    return mine.decode(latents), theirs.decode(latents).sample


def run_text(settings: dict, dtype: torch.dtype = torch.float32):
    projects = settings["architectures"] == ["CLIPTextModelWithProjection"]
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(**settings, attn_implementation="eager")
    theirs = randomize(kind(config), 0).to(dtype)
    mine = ours(ClipText, ClipTextConfig, settings)
    share(mine, theirs, lambda key: key if key.startswith("text_") else f"text_model.{key}")
    ids = torch.randint(1000, 40000, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[0, 9:], ids[1, 30:] = 49406, 49407, 49407
    reference = theirs(ids, output_hidden_states=True)
    pooled = reference.text_embeds if projects else reference.pooler_output
    last, penultimate, sentence = mine(ids)
    mine_flat = torch.cat([last.flatten(), penultimate.flatten(), sentence.flatten()])
    their_flat = [reference.last_hidden_state, reference.hidden_states[-2], pooled]
    return mine_flat, torch.cat([part.flatten() for part in their_flat])


# Official configurations at a fraction of their widths: the same structure, in seconds. The tests run these.
SMALL_SD15_UNET = SD15["unet"] | {"block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 96}
SMALL_SDXL_UNET = SDXL["unet"] | {
    "block_out_channels": [64, 128, 256], "attention_head_dim": [1, 2, 4], "cross_attention_dim": 192,
    "projection_class_embeddings_input_dim": 96 + 6 * 256, "transformer_layers_per_block": [1, 2, 3],
}  # fmt: skip
SMALL_VAE = SD15["vae"] | {"block_out_channels": [32, 64, 128, 128]}
SMALL_CLIP_L = SD15["text_encoder"] | {
    "hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 6, "num_hidden_layers": 4,
}  # fmt: skip
SMALL_BIGG = SDXL["text_encoder_2"] | {
    "hidden_size": 160, "intermediate_size": 640, "num_attention_heads": 5, "projection_dim": 96,
    "num_hidden_layers": 4,
}  # fmt: skip
BF16 = torch.bfloat16

SMALL: list[Row] = [
    ("timestep sinusoids", "320", run_sinusoids, 1e-5),
    ("residual block", "SD1.5, 640 -> 320", run_resnet, 1e-5),
    ("transformer, convolution in and out", "SD1.5, width 320", lambda: run_transformer(SD15, 0, 8, 1), 1e-5),
    ("transformer, linear in and out", "SDXL, width 640", lambda: run_transformer(SDXL, 1, 10, 2), 1e-5),
    ("feed-forward, GEGLU", "SD1.5, width 320", run_feed_forward, 1e-5),
    ("UNet", "SD1.5 at a fifth of the width", lambda: run_unet(SMALL_SD15_UNET, 16), 1e-4),
    ("UNet", "the same, odd size 13 x 13", lambda: run_unet(SMALL_SD15_UNET, 13), 1e-4),
    ("UNet", "SDXL at a fifth of the width", lambda: run_unet(SMALL_SDXL_UNET, 16), 1e-4),
    ("VAE encode", "at a quarter of the width", lambda: run_vae(SMALL_VAE, "encode"), 1e-4),
    ("VAE decode", "at a quarter of the width", lambda: run_vae(SMALL_VAE, "decode"), 1e-4),
    ("text encoder", "CLIP ViT-L at an eighth of the width", lambda: run_text(SMALL_CLIP_L), 1e-4),
    ("text encoder", "bigG at an eighth of the width", lambda: run_text(SMALL_BIGG), 1e-4),
]
OFFICIAL: list[Row] = [
    ("UNet", "SD1.5", lambda: run_unet(SD15["unet"], 16), 1e-4),
    ("UNet", "SD1.5, odd size 13 x 13", lambda: run_unet(SD15["unet"], 13), 1e-4),
    ("UNet, bf16", "SD1.5", lambda: run_unet(SD15["unet"], 16, BF16), 5e-2),
    ("VAE encode", "SD1.5 = SDXL", lambda: run_vae(SD15["vae"], "encode"), 1e-4),
    ("VAE decode", "SD1.5 = SDXL", lambda: run_vae(SD15["vae"], "decode"), 1e-4),
    ("VAE decode, bf16", "SD1.5 = SDXL", lambda: run_vae(SD15["vae"], "decode", BF16), 5e-2),
    ("text encoder", "CLIP ViT-L/14", lambda: run_text(SD15["text_encoder"]), 1e-4),
    ("text encoder, bf16", "CLIP ViT-L/14", lambda: run_text(SD15["text_encoder"], BF16), 5e-2),
]
LARGE: list[Row] = [
    ("text encoder", "OpenCLIP ViT-bigG/14", lambda: run_text(SDXL["text_encoder_2"]), 1e-4),
    ("UNet", "SDXL", lambda: run_unet(SDXL["unet"], 32), 1e-4),
]


@torch.no_grad()
def error_of(run: Callable[[], tuple[Tensor, Tensor]]) -> float:
    mine, theirs = run()
    assert mine.shape == theirs.shape and theirs.isfinite().all() and theirs.std() > 1e-3
    return ((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def table(rows: list[Row]) -> Iterator[str]:
    yield f"| {'module':36} | {'configuration':34} | error   | bound   | seconds |"
    yield f"|{'-' * 38}|{'-' * 36}|---------|---------|---------|"
    for module, configuration, run, bound in rows:
        start = time.time()
        error = error_of(run)
        assert error < bound, f"{module}, {configuration}: {error:.1e} is above {bound:.0e}"
        yield f"| {module:36} | {configuration:34} | {error:.1e} | {bound:.1e} | {time.time() - start:7.1f} |"


diffusers.utils.logging.set_verbosity_error()  # it warns of every .to()
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also SDXL's two large networks")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}")
    for line in table(SMALL + OFFICIAL + LARGE * arguments.full):
        print(line, flush=True)
