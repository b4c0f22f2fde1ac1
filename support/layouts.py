"""Checkpoints that name their tensors otherwise: single files, old folders.

Our attribute names are those of the official folders, so most models load without renaming. This file holds all the
exceptions: for each of our tensors, where it is found in such a file, and how. `model.py` uses it when loading.
"""

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Where a tensor of ours is found: its name in the file, and the way from the stored tensor to ours.
Source = tuple[str, Callable[[Tensor], Tensor]]


def as_stored(tensor: Tensor) -> Tensor:
    return tensor


def as_linear(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)  # a 1x1 convolution, (out, in, 1, 1), is a linear layer, (out, in)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


# ---- Folders: what earlier and later versions of the libraries write ------------------------------------------------

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # VAEs until early 2023


def sources_in_folder(component: str, keys: Iterable[str], stored: set[str]) -> dict[str, Source]:
    """For each of our keys of a component ("unet", "vae", "text_encoder"...), its source in the folder's files."""
    sources: dict[str, Source] = {key: (key, as_stored) for key in keys}
    if component == "vae" and any(".query." in name for name in stored):
        for key in sources:
            if ".attentions." in key:
                for new, old in OLD_ATTENTION.items():
                    if f".{new}." in key:
                        sources[key] = (key.replace(new, old), as_linear if key.endswith("weight") else as_stored)
    if component.startswith("text_encoder") and not any(name.startswith("text_model.") for name in stored):
        sources = {key: (key.removeprefix("text_model."), as_stored) for key in sources}
    return sources


def is_no_parameter(name: str) -> bool:
    """Tensors that some files hold although no network has them: old position counters, CLIP's training scale."""
    return name.endswith("embeddings.position_ids") or name.endswith(".model.logit_scale")


# ---- Single files: the layout of the original training code ---------------------------------------------------------

PREFIXES = {
    "SD1.5": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    },
    "SDXL": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}

# Rules (our name, its name): the first that matches the beginning of a key replaces it; numbers are kept as integers.
# The UNet's blocks are numbered through, three to a resolution: two residual blocks, then down- or upsampling.
UNET_PLACES = [
    (r"time_embedding\.linear_(\d)", lambda n: f"time_embed.{2 * n - 2}"),
    (r"add_embedding\.linear_(\d)", lambda n: f"label_emb.0.{2 * n - 2}"),
    (r"conv_in", lambda: "input_blocks.0.0"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda level, n: f"input_blocks.{1 + 3 * level + n}.0"),
    (r"down_blocks\.(\d)\.attentions\.(\d)", lambda level, n: f"input_blocks.{1 + 3 * level + n}.1"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda level: f"input_blocks.{3 + 3 * level}.0.op"),
    (r"mid_block\.resnets\.(\d)", lambda n: f"middle_block.{2 * n}"),
    (r"mid_block\.attentions\.0", lambda: "middle_block.1"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda level, n: f"output_blocks.{3 * level + n}.0"),
    (r"up_blocks\.(\d)\.attentions\.(\d)", lambda level, n: f"output_blocks.{3 * level + n}.1"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda level: f"output_blocks.{3 * level + 2}.2"),
    (r"conv_norm_out", lambda: "out.0"),
    (r"conv_out", lambda: "out.2"),
]
UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip

# The VAE's decoder counts its resolutions from fine to coarse, we count them in the order they run.
VAE_PLACES = [
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", lambda level, n: f"encoder.down.{level}.block.{n}"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", lambda level: f"encoder.down.{level}.downsample"),
    (r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda level, n: f"decoder.up.{3 - level}.block.{n}"),
    (r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda level: f"decoder.up.{3 - level}.upsample"),
    (r"encoder\.mid_block\.resnets\.(\d)", lambda n: f"encoder.mid.block_{n + 1}"),
    (r"decoder\.mid_block\.resnets\.(\d)", lambda n: f"decoder.mid.block_{n + 1}"),
    (r"encoder\.mid_block\.attentions\.0", lambda: "encoder.mid.attn_1"),
    (r"decoder\.mid_block\.attentions\.0", lambda: "decoder.mid.attn_1"),
    (r"encoder\.conv_norm_out", lambda: "encoder.norm_out"),
    (r"decoder\.conv_norm_out", lambda: "decoder.norm_out"),
]
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

OPENCLIP_PLACES = [
    (r"text_model\.embeddings\.token_embedding", lambda: "token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", lambda: "positional_embedding"),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn", lambda n: f"transformer.resblocks.{n}.attn"),
    (r"text_model\.encoder\.layers\.(\d+)", lambda n: f"transformer.resblocks.{n}"),
    (r"text_model\.final_layer_norm", lambda: "ln_final"),
    (r"text_projection\.weight", lambda: "text_projection"),
]
OPENCLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def rename(key: str, places: list, inside: dict[str, str]) -> str:
    """Apply the first of `places` that fits the beginning of `key`, and `inside` to what is left behind it."""
    for pattern, place in places:
        if match := re.match(pattern, key):
            rest = key[match.end() :]
            for ours, theirs in inside.items():
                rest = re.sub(rf"^\.{re.escape(ours)}\.", f".{theirs}.", rest)
            return place(*map(int, match.groups())) + rest
    return key


def unet_source(key: str, keys: Iterable[str]) -> Source:
    name = rename(key, UNET_PLACES, UNET_RESNET if ".resnets." in key else {})
    if match := re.match(r"up_blocks\.(\d)\.upsamplers", key):  # third in its block, or second where nothing attends
        if not any(k.startswith(f"up_blocks.{match[1]}.attentions.") for k in keys):
            name = name.replace(".2.conv", ".1.conv")
    return name, as_stored


def vae_source(key: str) -> Source:
    name = rename(key, VAE_PLACES, VAE_RESNET if ".resnets." in key else VAE_ATTENTION)
    projection = ".attentions." in key and ".to_" in key and key.endswith("weight")
    return name, as_linear if projection else as_stored


def openclip_source(key: str) -> Source:
    name = rename(key, OPENCLIP_PLACES, OPENCLIP_LAYER)
    if match := re.search(r"\.([qkv])_proj\.(weight|bias)$", name):  # one matrix holds queries, keys and values
        part = "qkv".index(match[1])
        return name[: match.start()] + f".in_proj_{match[2]}", lambda tensor: tensor.chunk(3)[part]
    return name, transposed if key.startswith("text_projection") else as_stored


def sources_in_single_file(
    family: str, component: str, keys: Iterable[str], stored: Iterable[str] = ()
) -> dict[str, Source]:
    """For each of our keys of a component, its source in a single file of `family` ("SD1.5" or "SDXL").

    stored: the names of the component's tensors in the file, if it may be another than the official one.
    """
    prefix = PREFIXES[family][component]
    if component == "unet":
        sources = {key: unet_source(key, keys) for key in keys}
    elif component == "vae":
        sources = {key: vae_source(key) for key in keys}
    elif component == "text_encoder_2":
        sources = {key: openclip_source(key) for key in keys}
    else:  # CLIP-L is named as in a folder, also in lacking `text_model.` here and there
        sources = sources_in_folder(component, keys, {name.removeprefix(prefix) for name in stored or keys})
    return {key: (prefix + name, view) for key, (name, view) in sources.items()}


def as_single_file(family: str, component: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back: a component's tensors under their names in a single file, and in the form that they have there."""
    ways_back = {as_linear: lambda tensor: tensor[:, :, None, None], transposed: transposed}
    stored: dict[str, list[tuple[str, Tensor]]] = {}
    for key, (name, view) in sources_in_single_file(family, component, tensors).items():
        stored.setdefault(name, []).append((key, ways_back.get(view, as_stored)(tensors[key])))

    def place(part: tuple[str, Tensor]) -> int:  # queries, keys and values are one matrix, in this order
        match = re.search(r"\.([qkv])_proj\.", part[0])
        return "qkv".index(match[1]) if match else 0

    return {name: torch.cat([tensor for _, tensor in sorted(parts, key=place)]) for name, parts in stored.items()}


def family_of(names: Iterable[str]) -> str:
    """The kind of a single file, "SD1.5" or "SDXL", from its tensors' names. Raises ValueError for any other."""

    def holds(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if holds("cond_stage_model.model."):
        raise ValueError("this is a Stable Diffusion 2 checkpoint; only SD1.5 and SDXL single files are supported")
    if holds("conditioner.embedders.0.model."):
        raise ValueError("this is the SDXL refiner; only the SDXL base model is supported")
    if holds("v_pred"):
        raise ValueError("this model predicts v, not epsilon (it has a tensor v_pred); it is not supported")
    family = "SDXL" if holds("conditioner.") else "SD1.5"
    for component, prefix in PREFIXES[family].items():
        if not holds(prefix):
            raise ValueError(
                f"the file has no {component} (no tensor begins with {prefix}); a whole SD1.5 or SDXL is needed"
            )
    return family


# ---- The official configurations, which single files leave out ------------------------------------------------------

VAE_SD15 = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "force_upcast": False,
}  # fmt: skip
CLIP_L = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False,
    "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
NOTHING = [None, None]
SD15_INDEX = {
    "_class_name": "StableDiffusionPipeline", "feature_extractor": NOTHING, "image_encoder": NOTHING,
    "requires_safety_checker": False, "safety_checker": NOTHING, "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
SD15 = {
    "model_index": SD15_INDEX,
    "unet": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": VAE_SD15,
    "text_encoder": CLIP_L,
    "scheduler": SCHEDULER,
}  # fmt: skip
SDXL = {
    "model_index": SD15_INDEX | {
        "_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    },
    "unet": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048, "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "in_channels": 4, "layers_per_block": 2, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
        "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "use_linear_projection": True,
    },
    "vae": VAE_SD15 | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_L | {
        "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
        "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
    },
    "scheduler": SCHEDULER,
}  # fmt: skip
for removed in "requires_safety_checker", "safety_checker":
    del SDXL["model_index"][removed]  # the SDXL pipeline has none
OFFICIAL = {"SD1.5": SD15, "SDXL": SDXL}
