"""Checkpoints that name their tensors otherwise: single files, old folders.

Our attribute names are those of the official folders, so most models load without renaming. This file holds all the
exceptions: for each of our tensors, where it is found in such a file, and how. `model.py` uses it when loading.
"""

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from support.checks import OTHERS, check_buffers, check_metadata, is_perflow
from support.errors import InputError
from support.files import listed
from support.folders import read_header
from support.official import OFFICIAL
from support.weights import Source, read_config


def as_stored(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


# ---- Spellings: what earlier and later libraries, and the converters between them, wrote ----------------------------

# (pattern in the usual name, other spelling). Attention of the VAE has had three names, in folders and single files;
# CLIP's names begin with `text_model.` or not. A projection named `.weight` is stored as ours, the other transposed.
SPELLINGS = [
    (r"\.to_([qkv])\.", lambda m: f".{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"\.to_out\.0\.", lambda m: ".proj_attn."),
    (r"attn_1\.([qkv])\.", lambda m: f"attn_1.to_{m[1]}."),
    (r"attn_1\.proj_out\.", lambda m: "attn_1.to_out.0."),
    (r"attn_1\.([qkv])\.", lambda m: f"attn_1.{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"attn_1\.proj_out\.", lambda m: "attn_1.proj_attn."),
    (r"(^|\.)text_model\.", lambda m: m[1]),
    (r"\.text_projection$", lambda m: ".text_projection.weight"),
]


def spelled(source: Source, stored: set[str]) -> Source:
    """A tensor's source under the name that it has among the `stored` ones."""
    name, view = source
    if name not in stored:
        for pattern, other in SPELLINGS:
            found = re.sub(pattern, other, name)
            if found != name and found in stored:
                return found, as_stored if found.endswith("text_projection.weight") else view
    return source


def sources_in_folder(keys: Iterable[str], stored: set[str]) -> dict[str, Source]:
    """For each of our keys of a network, its source in a folder's files, which hold the `stored` names."""
    return {key: spelled((key, as_stored), stored) for key in keys}


# ---- Single files: the layout of the original training code ---------------------------------------------------------

BOTH = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
CLIP, OPENCLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
PREFIXES = {
    "SD1.5": BOTH | {"text_encoder": "cond_stage_model.transformer."},
    "SDXL": BOTH | {"text_encoder": CLIP, "text_encoder_2": OPENCLIP},
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
    (r"(encoder|decoder)\.mid_block\.resnets\.(\d)", lambda part, n: f"{part}.mid.block_{n + 1}"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0", lambda part: f"{part}.mid.attn_1"),
    (r"(encoder|decoder)\.conv_norm_out", lambda part: f"{part}.norm_out"),
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
            return place(*(int(part) if part.isdigit() else part for part in match.groups())) + rest
    return key


def unet_source(key: str, keys: Iterable[str]) -> Source:
    name = rename(key, UNET_PLACES, UNET_RESNET if ".resnets." in key else {})
    if match := re.match(r"up_blocks\.(\d)\.upsamplers", key):  # third in its block, or second where nothing attends
        if not any(k.startswith(f"up_blocks.{match[1]}.attentions.") for k in keys):
            name = name.replace(".2.conv", ".1.conv")
    return name, as_stored


def vae_source(key: str) -> Source:
    return rename(key, VAE_PLACES, VAE_RESNET if ".resnets." in key else VAE_ATTENTION), as_stored


def openclip_source(key: str) -> Source:
    name = rename(key, OPENCLIP_PLACES, OPENCLIP_LAYER)
    if match := re.search(r"\.([qkv])_proj\.(weight|bias)$", name):  # one matrix holds queries, keys and values
        part = "qkv".index(match[1])
        return name[: match.start()] + f".in_proj_{match[2]}", lambda tensor: tensor.chunk(3)[part]
    return name, transposed if key.startswith("text_projection") else as_stored


def sources(family: str | None, part: str, keys: Iterable[str], stored: set[str] = frozenset()) -> dict[str, Source]:
    """For each key of a part, its source in a single file of `family` ("SD1.5" or "SDXL"), or in a folder where that is
    None. stored: the names in the files, where they may be spelled otherwise than in the official ones."""
    if family is None:
        return sources_in_folder(keys, stored)
    source = {
        "unet": lambda key: unet_source(key, keys), "vae": vae_source, "text_encoder_2": openclip_source,
        "text_encoder": lambda key: (key, as_stored),
    }[part]  # fmt: skip
    found = {key: source(key) for key in keys}
    return {key: spelled((PREFIXES[family][part] + name, view), stored) for key, (name, view) in found.items()}


def as_single_file(family: str, component: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back: a component's tensors under their names in a single file, and in the form that they have there."""
    stored: dict[str, list[Tensor]] = {}
    for key, (name, view) in sources(family, component, tensors).items():
        tensor = transposed(tensors[key]) if view is transposed else tensors[key]
        if ".attn_1." in name and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # the VAE's projections are 1x1 convolutions there
        stored.setdefault(name, []).append(tensor)
    # Queries, keys and values of the second text encoder are one matrix, in the order of its attributes.
    return {name: torch.cat(parts) for name, parts in stored.items()}


def single_file(
    networks: dict[str, nn.Module], scheduler: dict, where: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a model under their names in a single file, and the metadata of its header.

    A single file tells no settings but a flow's, in our metadata; so only official ones can be stored.
    """
    family, tensors = "SDXL" if "text_encoder_2" in networks else "SD1.5", {}
    for name, network in networks.items():
        official = vars(read_config(type(network.cfg), OFFICIAL[family][name], name))
        if other := [s for s, value in vars(network.cfg).items() if s not in UNTOLD and value != official[s]]:
            reason = f"the {name} is none of {family} ({listed(other)}); a single file cannot tell what it is"
            raise InputError(f"{where}: {reason}: keep the folder")
        tensors |= as_single_file(family, name, network.state_dict())
    is_flow = "num_time_windows" in scheduler or is_perflow(scheduler)
    return tensors, {f"scheduler.{name}": json.dumps(value) for name, value in scheduler.items() if is_flow}


UNTOLD = ("eos_token_id", "sample_size", "force_upcast", "architectures", "projection_dim")  # settings that may differ


def scheduler_in(metadata: dict[str, str], where: Path) -> dict:
    """The scheduler settings that `single_file` wrote."""
    try:
        ours = {name: value for name, value in metadata.items() if name.startswith("scheduler.")}
        return {name.removeprefix("scheduler."): json.loads(value) for name, value in ours.items()}
    except ValueError as error:
        raise InputError(f"{where}: the scheduler settings in its metadata are damaged ({error})") from None


def family_of(names: Iterable[str], where: Path) -> str:
    """The kind of a single file, "SD1.5" or "SDXL", from its tensors' names. Raises InputError for any other."""

    def holds(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    for prefix, model in OTHERS.items():
        if holds(prefix):
            raise InputError(f"{where}: this is {model}; only SD1.5 and SDXL base models are supported")
    family = "SDXL" if holds("conditioner.") else "SD1.5"
    for component, prefix in PREFIXES[family].items():
        if not holds(prefix):
            reason = f"the file has no {component} (no tensor begins with {prefix})"
            raise InputError(f"{where}: {reason}; a whole SD1.5 or SDXL is needed")
    return family


def read_single_file(
    file: Path, alphas_cumprod: Tensor, variant: str | None
) -> tuple[str, dict[str, dict], dict[str, dict[str, Path]]]:
    """(family, settings, tensors of each network) of a single file. Its settings are the official ones of its family;
    only a flow of ours also holds those of its scheduler. alphas_cumprod: Stable Diffusion's. Raises InputError."""
    names, metadata = read_header(file)
    if variant:
        raise InputError(f"{file} is a single file, which has no variants; leave --variant out")
    family = family_of(names, file)
    check_metadata(metadata, family, file)
    check_buffers(file, names, alphas_cumprod)
    configs = copy.deepcopy(OFFICIAL[family])
    configs["scheduler"] |= scheduler_in(metadata, file)
    parts = PREFIXES[family].items()
    return family, configs, {part: {n: file for n in names if n.startswith(prefix)} for part, prefix in parts}
