"""weights.py: whichever official form the files have, the same tensors arrive; anything else is refused by name."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT, edit, read, refusal, rewrite, same, write
from safetensors.torch import load_file, save_file

from model import NETWORKS, StableDiffusion
from support import official
from support.errors import InputError
from support.files import read_json, replaced, write_text
from support.folders import find_tensors
from support.weights import build, read_config
from unet import UNet, UNetConfig

load = StableDiffusion.load
STEM = "diffusion_pytorch_model"
UNET_FILE = f"{STEM}.safetensors"


def shard(folder, index, variant):
    """Cut the weight file of a folder in two, with an index of the given name."""
    tensors = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    weight_map = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"{STEM}{variant}-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    write(folder / index, {"metadata": {"total_size": 0}, "weight_map": weight_map})


# ---- which file is read ----


@pytest.mark.parametrize(
    "index", ["{}.safetensors.index{}.json", "{}.safetensors{}.index.json", "{}{}.safetensors.index.json"]
)
@pytest.mark.parametrize("variant", ["", ".v0-fix"])
def test_shards_are_found_by_every_spelling_of_an_index(tmp_path, index, variant):
    tensors = {name: torch.ones(1) for name in "abc"}
    save_file(tensors, tmp_path / UNET_FILE)
    shard(tmp_path, index.format(STEM, variant), variant)
    assert find_tensors(tmp_path, STEM, None).keys() == tensors.keys()


@pytest.mark.parametrize(
    "names, dtype, variant, taken",
    [
        (["", ".non_ema", ".fp16"], torch.float32, None, ""),
        (["", ".fp16"], None, None, ""),
        (["", ".fp16"], torch.float16, None, ".fp16"),
        ([".fp16"], torch.float32, None, ".fp16"),
        ([".v0-fix"], torch.float16, None, ".v0-fix"),
        (["", ".v0-fix", ".v0-1"], None, "v0-fix", ".v0-fix"),
        (["", ".fp16", ".bf16"], torch.float16, "bf16", ".bf16"),
        (["", ".fp16"], None, "v0-fix", ""),  # another part of the model has it
        ([".v0-fix", ".v0-1"], None, None, None),
    ],
)
def test_of_several_variants_one_is_taken(tmp_path, names, dtype, variant, taken):
    for name in names:
        save_file({"a": torch.ones(1)}, tmp_path / f"{STEM}{name}.safetensors")
    if taken is None:
        message = refusal(find_tensors, tmp_path, STEM, dtype)
        assert "several variants; choose one with --variant: v0-1, v0-fix" in message
    else:
        found = find_tensors(tmp_path, STEM, dtype, variant)
        assert found == {"a": tmp_path / f"{STEM}{taken}.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [None, "v0"])
def test_what_the_reference_libraries_shard_loads_too(sd15_pipeline, sd15, tmp_path, variant):
    sd15_pipeline.save_pretrained(tmp_path / "saved", variant=variant, max_shard_size="100KB")
    sharded, whole = load(tmp_path / "saved", variant=variant), load(sd15)
    for name, network in sharded.networks.items():
        assert len(list((tmp_path / "saved" / name).glob("*.safetensors"))) > 1
        assert same(network.state_dict(), whole.networks[name].state_dict())


# ---- which settings are read ----


@pytest.mark.parametrize(
    "part, settings, complaint",
    [
        ("unet", {"shiny_new_option": 7}, "shiny_new_option = 7 is not supported: we do not know this setting"),
        ("unet", {"shiny_new_option": None, "_name_or_path": "somewhere"}, None),  # not used, and a note
        ("unet", {"act_fn": "gelu"}, "act_fn = 'gelu' is not supported, only 'silu'"),
        ("unet", {"up_block_types": ["AttnUpBlock2D"] * 4}, "only 'UpBlock2D' and 'CrossAttnUpBlock2D'"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type = 'image' is not supported"),
        ("unet", {"down_block_types": [["DownBlock2D"]] * 4}, "down_block_types = [['DownBlock2D'], "),
        ("unet", {"attention_head_dim": [2, 2, 2]}, "attention_head_dim has 3 entries, block_out_channels has 4"),
        ("unet", {"norm_num_groups": 3}, "num_channels (320) must be divisible by num_groups (3)"),
        ("unet", {"block_out_channels": "wide"}, "block_out_channels = 'wide' is not"),
        ("unet", {"layers_per_block": -1}, "layers_per_block = -1 is not"),
        ("unet", {"cross_attention_dim": None}, "cross_attention_dim is missing"),
        ("vae", {"use_quant_conv": False}, "use_quant_conv = False is not supported, only True"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported, only 'quick_gelu' and 'gelu'"),
        ("text_encoder", {"num_attention_heads": 7}, "hidden_size 768 cannot be divided among 7 heads"),
    ],
)
def test_settings_that_need_other_code_are_refused_by_name(part, settings, complaint):
    network_class, config_class = NETWORKS[part]

    def make(content):
        build(network_class, read_config(config_class, content, "here"), "here")

    content = official.SD15[part] | settings
    if complaint is None:
        make(content)
    else:
        assert complaint in refusal(make, content)


# ---- what does not fit ----


@pytest.mark.slow
def test_tensors_that_do_not_fit_are_named(sd15_copy):
    unet, vae = sd15_copy / "unet" / UNET_FILE, sd15_copy / "vae" / UNET_FILE
    edit(sd15_copy / "text_encoder/config.json", intermediate_size=64)
    message = refusal(load, sd15_copy)
    assert "9 of another shape (encoder.layers.0.mlp.fc1.weight is (128, 32), should be (64, 32), " in message
    assert message.count("should be") == 3 and message.endswith(", ...)")
    rewrite(vae, lambda tensors: tensors | {"lora.up": torch.zeros(1)})
    message = refusal(load, sd15_copy)
    assert "vae: the tensors do not fit the config: 1 that the network does not have (lora.up)" in message
    rewrite(unet, lambda tensors: {k: t for k, t in tensors.items() if k != "conv_in.bias"})
    assert "unet: the tensors do not fit the config: 1 missing (conv_in.bias)" in refusal(load, sd15_copy)


@pytest.mark.parametrize("length", [0, 500, -1])
def test_a_truncated_file_is_refused(sd15, tmp_path, length):
    (tmp_path / UNET_FILE).write_bytes((sd15 / "unet" / UNET_FILE).read_bytes()[:length])
    message = refusal(find_tensors, tmp_path, STEM, None)
    assert str(tmp_path / UNET_FILE) in message and "damaged, truncated or no safetensors file" in message


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_and_a_missing_shard_are_refused(tmp_path, content):
    (tmp_path / f"{UNET_FILE}.index.json").write_text(content)
    assert f"{UNET_FILE}.index.json" in refusal(find_tensors, tmp_path, STEM, None)
    write(tmp_path / f"{UNET_FILE}.index.json", {"weight_map": {"a": "lost.safetensors"}})
    assert f"{tmp_path / 'lost.safetensors'} does not exist" in refusal(find_tensors, tmp_path, STEM, None)


class Bomb:
    def __reduce__(self):
        return print, ("a pickle has run code",)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin"])
def test_a_pickle_is_refused_unopened(tmp_path, name, capsys):
    torch.save({"state_dict": Bomb()}, tmp_path / name)
    wanted = f"{name} is a pickle, which can run any code when opened; get the model's .safetensors"
    assert wanted in refusal(load, tmp_path / name) and wanted in refusal(find_tensors, tmp_path, STEM, None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"{'a': 1}", b"[1]", b"\xff\xfe\x00", b"[" * 10**5])
def test_a_broken_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert str(tmp_path / "config.json") in refusal(read_json, tmp_path / "config.json")


# ---- written files ----


def test_files_and_folders_appear_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a/b.txt", "old")
    with replaced(tmp_path / "a") as aside:
        write_text(aside / "c.txt", "new")
        assert (tmp_path / "a/b.txt").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "c.txt"]
    for error, expected in (OSError("disk full"), InputError), (KeyboardInterrupt(), KeyboardInterrupt):
        with pytest.raises(expected), replaced(tmp_path / "a") as aside:
            write_text(aside / "d.txt", "never")
            raise error
    assert "cannot write" in refusal(write_text, tmp_path / "a", "a folder is there")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "c.txt"]


# ---- lean ----


# The process's highest memory minus what is in use before loading, over the size of the loaded weights. Every page of
# them is read: a tensor that needs no conversion is only mapped by loading, and costs nothing yet.
MEASURE = """
import sys, torch
from model import StableDiffusion

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

StableDiffusion.load(sys.argv[3])  # a small model, for what the first load of all costs once
before = kilobytes("VmRSS")
sd = StableDiffusion.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
weights = [p for network in sd.networks.values() for p in network.parameters()]
assert all(p.view(-1)[::512].any() for p in weights)
print((kilobytes("VmHWM") - before) * 1024 / sum(p.nbytes for p in weights))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from /proc")
@pytest.mark.parametrize("stored, wanted", [("float32", "float32"), ("float16", "float32"), ("float32", "float16")])
def test_loading_takes_no_more_memory_than_the_weights(sd15_copy, sd15, stored, wanted):
    """The UNet has SD1.5's structure at a quarter of its width: 54 million weights."""
    unet = sd15_copy / "unet"
    edit(unet / "config.json", block_out_channels=[80, 160, 320, 320], norm_num_groups=16)
    shapes = build(UNet, read_config(UNetConfig, read(unet / "config.json"), "unet")).state_dict()
    (unet / UNET_FILE).unlink()
    save_file({name: torch.ones(t.shape, dtype=getattr(torch, stored)) for name, t in shapes.items()}, unet / UNET_FILE)
    command = [sys.executable, "-c", MEASURE, sd15_copy, wanted, sd15]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(run.stdout) < 1.15
