"""What several tests use: small models with the structure of the official ones, made by the reference libraries."""

import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.utils._python_dispatch import TorchDispatchMode

from model import StableDiffusion
from support import official
from support.errors import InputError
from support.weights import build

MERGES = ["t h", "th e</w>", "r e", "re d</w>", "c a", "ca t</w>", "a</w> b", "i n", "o n</w>"]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@torch.no_grad()
def randomize(module, seed):
    """Random weights under which every tensor matters: a wrong, swapped or forgotten one changes the result.

    Fresh networks will not do: their biases are 0 and their norms' weights 1, so that two can change places unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if id(weight) in embeddings:
            noise = 0.5 * noise
        elif weight.dim() >= 2:
            noise = noise / weight[0].numel() ** 0.5  # keeps the scale of what passes through
        elif name.endswith("weight"):
            noise = 1 + 0.2 * noise  # norms
        else:
            noise = 0.1 * noise
        weight.copy_(noise)
    return module.eval().requires_grad_(False)


def write_tokenizer(folder, pad_token=END):
    """A CLIP tokenizer of few words, in the published files' form; today's library writes a tokenizer.json instead."""
    letters = sorted(ByteLevel.alphabet())  # "!" is the first, as in the official vocabulary
    tokens = letters + [letter + "</w>" for letter in letters] + [m.replace(" ", "") for m in MERGES] + [BEGIN, END]
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = special | {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    write(folder / "tokenizer_config.json", settings)
    write(folder / "special_tokens_map.json", special)
    return folder


def refusal(call, *args, **kwargs):
    """The message of the InputError that a call must end with: one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def edit(path, **settings):
    """Change settings of a JSON file; None takes one out."""
    content = {k: v for k, v in (read(path) | settings).items() if v is not None}
    write(path, content)


def rewrite(file, change):
    """Put `change(tensors)` in the place of a safetensors file's tensors."""
    tensors = change(load_file(file))
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


def same(tensors, others):
    """Are two state dicts the same, bit for bit?"""
    return tensors.keys() == others.keys() and all(
        tensors[key].dtype == others[key].dtype and torch.equal(tensors[key], others[key]) for key in tensors
    )


VOCABULARY = 2 * 256 + len(MERGES) + 2
SMALL_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "projection_dim": 32, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
}  # fmt: skip
WIDER = {"hidden_size": 48, "intermediate_size": 192, "projection_dim": 48}
TEXT, TEXT_2 = official.SD15["text_encoder"] | SMALL_TEXT, official.SDXL["text_encoder_2"] | SMALL_TEXT | WIDER
UNET = official.SD15["unet"] | {
    "block_out_channels": [8, 16, 32, 32], "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 32,
    "sample_size": 8,
}  # fmt: skip
UNET_XL = official.SDXL["unet"] | {
    "block_out_channels": [8, 16, 32], "norm_num_groups": 4, "attention_head_dim": [1, 2, 4], "cross_attention_dim": 80,
    "sample_size": 8, "transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 96,
}  # fmt: skip
SMALL_VAE = {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 4}
VAE, VAE_XL = (family["vae"] | SMALL_VAE for family in (official.SD15, official.SDXL))


# The reference libraries take seconds to import, so only who needs them does.
def sd15_pipeline(folder):
    """SD1.5 in small: four resolutions, three of them with cross-attention, one text encoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    return StableDiffusionPipeline(
        unet=randomize(UNet2DConditionModel.from_config(UNET), 1),
        vae=randomize(AutoencoderKL.from_config(VAE), 2),
        text_encoder=randomize(CLIPTextModel(CLIPTextConfig(**TEXT)), 3),
        tokenizer=CLIPTokenizer.from_pretrained(write_tokenizer(folder)),
        scheduler=DDIMScheduler.from_config(official.SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl_pipeline(folder):
    """SDXL in small: deeper transformers with linear projections, two text encoders, image sizes as a condition."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    return StableDiffusionXLPipeline(
        unet=randomize(UNet2DConditionModel.from_config(UNET_XL), 4),
        vae=randomize(AutoencoderKL.from_config(VAE_XL), 5),
        text_encoder=randomize(CLIPTextModel(CLIPTextConfig(**TEXT)), 6),
        text_encoder_2=randomize(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)), 7),
        tokenizer=CLIPTokenizer.from_pretrained(write_tokenizer(folder / "1")),
        tokenizer_2=CLIPTokenizer.from_pretrained(write_tokenizer(folder / "2", pad_token="!")),
        scheduler=DDIMScheduler.from_config(official.SCHEDULER),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


def shapes_only(folder, **scheduler):
    """The model of a folder on the meta device, where tensors have no values to be read, as if a GPU had not finished
    yet; with these settings of its scheduler."""
    sd = StableDiffusion.load(folder)
    networks = {name: build(type(network), network.cfg) for name, network in sd.networks.items()}
    return StableDiffusion(networks, sd.tokenizers, sd.configs | {"scheduler": sd.configs["scheduler"] | scheduler})


class NoWaiting(TorchDispatchMode):
    """Fails where tensors are copied to another device in such a way that the CPU waits for it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and result.device != args[0].device:
            assert kwargs.get("non_blocking"), f"a copy of {tuple(result.shape)} to {result.device} that is waited for"
        return result


def exit_code(module, *arguments):
    """Run a program within this process, which is faster: the exit code of its main()."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, arguments)])
        try:
            module.main()
        except SystemExit as stop:
            return stop.code
    return 0


def command(module, *arguments, processes=1, torchrun=False):
    """The same as a user starts it: a command line, under torchrun where there are several processes."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = start if torchrun or processes > 1 else []
    return [sys.executable, *start, "-m", module.__name__, *map(str, arguments)]


ROOT = Path(__file__).parent.parent
# The environment for `command`. Equal sums need equally many threads.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def write_shard(file, keys, broken=(), captions=True, facts=None):
    """A tar file as img2dataset writes it: an image, KEY.txt and KEY.json per sample; the color tells the key."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for key in keys:
            image = io.BytesIO()
            Image.new("RGB", (96, 64), (key % 256, key // 256, 99)).save(image, "png")
            content = b"no image" if key in broken else image.getvalue()
            parts = {"png": content, "json": json.dumps({"caption": f"fact {key}"} | (facts or {})).encode()}
            if captions:
                parts["txt"] = f"caption {key}".encode()
            for kind, content in parts.items():
                member = tarfile.TarInfo(f"{key:09d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
