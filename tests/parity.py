"""How close are our networks to those of diffusers and transformers, at the official configurations?

    PYTHONPATH=. python tests/parity.py            SDXL's UNet takes 10 GB

The reference gets random weights in which every tensor matters (`helpers.randomize`), ours takes the very same tensors,
both see the same input. The error is the largest difference, relative to the largest value of the reference.
"""

import copy
import functools
import json
import time
from collections.abc import Callable

import diffusers
import torch
import transformers
from helpers import randomize
from torch import Tensor, nn

from model import NETWORKS
from support.layouts import sources_in_folder
from support.official import SD15, SDXL
from support.weights import build, read_config

BF16 = torch.bfloat16
Row = tuple[str, str, Callable[[], tuple[Tensor, Tensor]], float]  # module, configuration, run -> (ours, theirs), bound


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def empty_reference(settings: dict) -> nn.Module:
    """The reference library's network of a config.json."""
    if "architectures" in settings:
        config = transformers.CLIPTextConfig(**settings, attn_implementation="eager")
        return getattr(transformers, settings["architectures"][0])(config)
    arguments = {name: value for name, value in settings.items() if not name.startswith("_")}
    return getattr(diffusers, settings["_class_name"])(**arguments)


@functools.lru_cache(maxsize=1)  # drawing the weights takes longer than running the network
def reference(settings: str) -> nn.Module:
    return randomize(empty_reference(json.loads(settings)), 0)


def pair(part: str, settings: dict, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Our network and the reference's, with the same tensors."""
    theirs = reference(json.dumps(settings))
    if dtype != torch.float32:
        theirs = copy.deepcopy(theirs).to(dtype)
    network_class, config_class = NETWORKS[part]
    ours, stored = build(network_class, read_config(config_class, settings, part)), theirs.state_dict()
    sources = sources_in_folder(ours.state_dict(), stored.keys())
    assert sorted(name for name, _ in sources.values()) == sorted(stored)
    ours.load_state_dict({key: stored[name] for key, (name, _) in sources.items()}, strict=True, assign=True)
    assert eps_of(ours) == eps_of(theirs)  # inputs of ordinary size would not show a wrong one
    return ours, theirs


def eps_of(network: nn.Module) -> dict[str, float]:
    norms = {name: m for name, m in network.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    return {name.removeprefix("text_model."): norm.eps for name, norm in norms.items()}


def run_unet(settings: dict, size: int, dtype: torch.dtype = torch.float32):
    ours, theirs = pair("unet", settings, dtype)
    x, t = draw(2, 4, size, size).to(dtype), torch.tensor([999, 17])
    text, extra, added = draw(2, 77, settings["cross_attention_dim"], seed=2).to(dtype), (), None
    if settings.get("addition_embed_type"):
        time_ids = torch.tensor([[1024, 768, 0, 16, 1024, 1024], [512, 512, 8, 0, 1024, 512]])
        sizes = 6 * settings["addition_time_embed_dim"]
        pooled = draw(2, settings["projection_class_embeddings_input_dim"] - sizes, seed=3).to(dtype)
        extra, added = (pooled, time_ids), {"text_embeds": pooled, "time_ids": time_ids}
    return ours(x, t, text, *extra), theirs(x, t, text, added_cond_kwargs=added).sample


def run_vae(settings: dict, what: str, dtype: torch.dtype = torch.float32):
    ours, theirs = pair("vae", settings, dtype)
    if what == "encode":
        images = draw(1, 3, 128, 96).clamp(-1, 1).to(dtype)
        return torch.cat(ours.encode(images)), torch.cat(theirs.encode(images).latent_dist.parameters.chunk(2, dim=1))
    # Some CPUs have no fast bf16 convolution for the reference's memory order: minutes, if the image is not small.
    latents = draw(1, 4, *((16, 12) if dtype == torch.float32 else (4, 3))).to(dtype)
    return ours.decode(latents), theirs.decode(latents).sample


def run_text(settings: dict, dtype: torch.dtype = torch.float32):
    ours, theirs = pair("text_encoder", settings, dtype)
    begin, end = settings["vocab_size"] - 2, settings["vocab_size"] - 1
    ids = torch.randint(1000, 40000, (2, 77), generator=torch.Generator().manual_seed(1)) % begin
    ids[:, 0], ids[0, 9:], ids[1, 30:] = begin, end, end
    found = theirs(ids, output_hidden_states=True)
    pooled = found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output
    wanted = found.last_hidden_state, found.hidden_states[-2], pooled
    return torch.cat([part.flatten() for part in ours(ids)]), torch.cat([part.flatten() for part in wanted])


ROWS: list[Row] = [
    ("UNet", "SD1.5", lambda: run_unet(SD15["unet"], 16), 1e-4),
    ("UNet", "SD1.5, odd size 13 x 13", lambda: run_unet(SD15["unet"], 13), 1e-4),
    ("UNet, bf16", "SD1.5", lambda: run_unet(SD15["unet"], 16, BF16), 5e-2),
    ("VAE encode", "SD1.5 = SDXL", lambda: run_vae(SD15["vae"], "encode"), 1e-4),
    ("VAE decode", "SD1.5 = SDXL", lambda: run_vae(SD15["vae"], "decode"), 1e-4),
    ("VAE decode, bf16", "SD1.5 = SDXL", lambda: run_vae(SD15["vae"], "decode", BF16), 5e-2),
    ("text encoder", "CLIP ViT-L/14", lambda: run_text(SD15["text_encoder"]), 1e-4),
    ("text encoder, bf16", "CLIP ViT-L/14", lambda: run_text(SD15["text_encoder"], BF16), 5e-2),
    ("text encoder", "OpenCLIP ViT-bigG/14", lambda: run_text(SDXL["text_encoder_2"]), 1e-4),
    ("UNet", "SDXL", lambda: run_unet(SDXL["unet"], 32), 1e-4),
]


@torch.no_grad()
def error_of(run: Callable[[], tuple[Tensor, Tensor]]) -> float:
    ours, theirs = run()
    assert ours.shape == theirs.shape and theirs.isfinite().all() and theirs.std() > 1e-3
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def main() -> None:
    diffusers.utils.logging.set_verbosity_error()  # it warns of every .to()
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}\n")
    print(f"| {'module':18} | {'configuration':23} | error   | bound   | seconds |")
    print(f"|{'-' * 20}|{'-' * 25}|---------|---------|---------|")
    for module, what, run, bound in ROWS:
        start, error = time.time(), error_of(run)
        print(f"| {module:18} | {what:23} | {error:.1e} | {bound:.1e} | {time.time() - start:7.1f} |", flush=True)
        assert error < bound, "above the bound"


if __name__ == "__main__":
    main()
