"""checkpoint.py: whichever official form the files have, the same tensors arrive; anything else is refused by name."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import edit, read, refusal, rewrite, same, write
from safetensors.torch import load_file, save_file

from model import StableDiffusion
from support.weights import build, read_config
from unet import UNet, UNetConfig

load = StableDiffusion.load
UNET_FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"


def half(tensors):
    return {name: tensor.half() for name, tensor in tensors.items()}


def shard(folder, index):
    """Cut the weight file of a folder in two, with an index of the given name."""
    tensors = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    weight_map = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    write(folder / index, {"metadata": {"total_size": 0}, "weight_map": weight_map})


# ---- which file is read ----


def test_a_folder_gives_exactly_the_tensors_of_its_files(sd15):
    sd = load(sd15)
    assert same(sd.unet.state_dict(), load_file(sd15 / "unet" / UNET_FILE))
    assert same(sd.vae.state_dict(), load_file(sd15 / "vae" / UNET_FILE))
    assert not any(p.requires_grad for p in sd.unet.parameters()) and not sd.unet.training


def test_of_two_variants_float16_is_read_only_for_float16(sd15_copy):
    # the variant is given other values, so that we see which file was read
    tensors = load_file(sd15_copy / "unet" / UNET_FILE)
    variant = {name: 2 * tensor for name, tensor in half(tensors).items()}
    save_file(variant, sd15_copy / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert same(load(sd15_copy, dtype=torch.float32).unet.state_dict(), tensors)
    assert same(load(sd15_copy, dtype=None).unet.state_dict(), tensors)
    assert same(load(sd15_copy, dtype=torch.float16).unet.state_dict(), variant)


def test_a_folder_with_only_the_float16_variant_loads_in_any_dtype(sd15_copy):
    for name, stem in ("unet", UNET_FILE), ("vae", UNET_FILE), ("text_encoder", TEXT_FILE):
        file = sd15_copy / name / stem
        rewrite(file, half)
        file.rename(file.with_name(stem.replace(".safetensors", ".fp16.safetensors")))
    for dtype, found in (torch.float32, torch.float32), (torch.float16, torch.float16), (None, torch.float16):
        sd = load(sd15_copy, dtype=dtype)
        assert {p.dtype for network in sd.networks.values() for p in network.parameters()} == {found}


def test_non_ema_weights_beside_the_others_are_not_read(sd15_copy, sd15):
    for name in "non_ema.safetensors", "non_ema.bin":
        (sd15_copy / f"unet/diffusion_pytorch_model.{name}").write_bytes(b"nobody opens this")
    assert same(load(sd15_copy).unet.state_dict(), load(sd15).unet.state_dict())


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.fp16.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ],
)
def test_shards_are_found_by_every_spelling_of_an_index(sd15_copy, sd15, index):
    shard(sd15_copy / "unet", index)
    assert same(load(sd15_copy).unet.state_dict(), load(sd15).unet.state_dict())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_the_reference_libraries_shard_loads_too(sd15_pipeline, sd15, tmp_path, variant):
    sd15_pipeline.save_pretrained(tmp_path / "saved", variant=variant, max_shard_size="100KB")
    sharded, whole = load(tmp_path / "saved"), load(sd15)
    for name, network in sharded.networks.items():
        assert len(list((tmp_path / "saved" / name).glob("*.safetensors"))) > 1
        assert same(network.state_dict(), whole.networks[name].state_dict())


# ---- which settings are read ----


@pytest.mark.parametrize(
    "file, settings, complaint",
    [
        ("unet", {"shiny_new_option": 7}, "shiny_new_option = 7 is not supported: we do not know this setting"),
        ("unet", {"act_fn": "gelu"}, "act_fn = 'gelu' is not supported, only 'silu'"),
        ("unet", {"up_block_types": ["AttnUpBlock2D"] * 4}, "only 'UpBlock2D' and 'CrossAttnUpBlock2D'"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type = 'timestep' is not supported"),
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256 is not supported"),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type = 'UNetMidBlock2D' is not supported, only"),
        ("unet", {"down_block_types": [["DownBlock2D"]] * 4}, "down_block_types = [['DownBlock2D'], "),
        ("unet", {"attention_head_dim": [2, 2, 2]}, "attention_head_dim has 3 entries, block_out_channels has 4"),
        ("unet", {"norm_num_groups": 3}, "num_channels (8) must be divisible by num_groups (3)"),
        ("unet", {"cross_attention_dim": None}, "cross_attention_dim is missing"),
        ("vae", {"latents_mean": [0, 0, 0, 0]}, "latents_mean = [0, 0, 0, 0] is not supported"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
    ],
)
def test_settings_that_need_other_code_are_refused_by_name(sd15_copy, file, settings, complaint):
    edit(sd15_copy / file / "config.json", **settings)
    message = refusal(load, sd15_copy)
    assert f"{file} config: " in message and complaint in message


def test_null_means_not_used_and_an_underscore_means_a_note(sd15_copy):
    path = sd15_copy / "unet/config.json"
    write(path, read(path) | {"shiny_new_option": None, "_name_or_path": "somewhere"})
    load(sd15_copy)


# ---- what does not fit ----


def test_a_missing_tensor_is_named(sd15_copy):
    rewrite(sd15_copy / "unet" / UNET_FILE, lambda tensors: {k: t for k, t in tensors.items() if k != "conv_in.bias"})
    assert "unet: the tensors do not fit the config: 1 missing (conv_in.bias)" in refusal(load, sd15_copy)


def test_a_tensor_too_many_is_named(sd15_copy):
    rewrite(sd15_copy / "vae" / UNET_FILE, lambda tensors: tensors | {"lora.up": torch.zeros(1)})
    message = refusal(load, sd15_copy)
    assert "vae: the tensors do not fit the config: 1 that the network does not have (lora.up)" in message


def test_of_misshapen_tensors_the_first_are_named_with_both_shapes(sd15_copy):
    edit(sd15_copy / "text_encoder/config.json", intermediate_size=64)
    message = refusal(load, sd15_copy)
    assert "9 of another shape (encoder.layers.0.mlp.fc1.weight is (128, 32), should be (64, 32), " in message
    assert message.count("should be") == 3 and message.endswith(", ...)")


@pytest.mark.parametrize("length", [0, 4, 500, -1])
def test_a_truncated_file_is_refused(sd15_copy, length):
    file = sd15_copy / "unet" / UNET_FILE
    file.write_bytes(file.read_bytes()[:length])
    message = refusal(load, sd15_copy)
    assert str(file) in message and "damaged, truncated or no safetensors file" in message


def test_a_file_that_only_points_to_the_weights_is_refused(sd15_copy):
    # what a clone without Git LFS leaves
    (sd15_copy / "unet" / UNET_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    assert "fetch it again" in refusal(load, sd15_copy)


def test_a_missing_shard_is_named(sd15_copy):
    shard(sd15_copy / "unet", UNET_FILE + ".index.json")
    lost = sd15_copy / "unet/diffusion_pytorch_model-00002-of-00002.safetensors"
    lost.unlink()
    assert f"{lost} does not exist" in refusal(load, sd15_copy)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"conv_in.bias": 3}}'])
def test_a_broken_index_is_refused(sd15_copy, content):
    (sd15_copy / "unet" / UNET_FILE).unlink()
    (sd15_copy / "unet" / f"{UNET_FILE}.index.json").write_text(content)
    assert f"{UNET_FILE}.index.json" in refusal(load, sd15_copy)


class Bomb:
    def __reduce__(self):
        return print, ("a pickle has run code",)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.pth", "model.pkl"])
def test_a_pickle_is_refused_unopened(tmp_path, name, capsys):
    torch.save({"state_dict": Bomb()}, tmp_path / name)
    message = refusal(load, tmp_path / name)
    assert "is a pickle, which can run any code when it is opened; get the .safetensors" in message
    assert capsys.readouterr().out == ""


def test_a_folder_of_pickles_is_refused(sd15_copy):
    (sd15_copy / "unet" / UNET_FILE).rename(sd15_copy / "unet/diffusion_pytorch_model.bin")
    assert "unet/diffusion_pytorch_model.bin is a pickle" in refusal(load, sd15_copy)


@pytest.mark.parametrize("content", [b"{'a': 1}", b"", b"[1]", b"null", b"\xff\xfe\x00", b"[" * 10**5])
def test_a_broken_config_is_refused(sd15_copy, content):
    path = sd15_copy / "unet/config.json"
    path.write_bytes(content)
    assert f"{path} is not readable JSON" in refusal(load, sd15_copy)


# ---- lean ----


def test_nothing_is_initialized_and_no_random_number_is_drawn(sd15, monkeypatch):
    initialized = []
    for name in "uniform_", "normal_", "kaiming_uniform_", "ones_", "zeros_":  # those that torch's layers call
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: initialized.append(tensor.device.type))
    before = torch.get_rng_state()
    load(sd15)
    assert set(initialized) == {"meta"}  # where there is nothing to write to
    assert torch.equal(torch.get_rng_state(), before)


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


@pytest.fixture(scope="module")
def large(sd15, tmp_path_factory):
    """fp32 and fp16 folders whose UNet has SD1.5's structure at a quarter of its width: 54 million weights."""
    folder = tmp_path_factory.mktemp("large")
    for dtype in torch.float32, torch.float16:
        path = shutil.copytree(sd15, folder / str(dtype))
        edit(path / "unet/config.json", block_out_channels=[80, 160, 320, 320], norm_num_groups=16)
        config = read_config(UNetConfig, read(path / "unet/config.json"), "unet")
        shapes = build(UNet, config).state_dict()
        save_file({name: torch.ones(t.shape, dtype=dtype) for name, t in shapes.items()}, path / "unet" / UNET_FILE)
        for file in path / "vae" / UNET_FILE, path / "text_encoder" / TEXT_FILE:
            rewrite(file, lambda tensors, dtype=dtype: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from /proc")
@pytest.mark.parametrize(
    "stored, wanted", [("float32", "float32"), ("float16", "float32"), ("float32", "float16"), ("float16", "float16")]
)
def test_loading_takes_no_more_memory_than_the_weights(large, sd15, stored, wanted):
    command = [sys.executable, "-c", MEASURE, large / f"torch.{stored}", wanted, sd15]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(checkpoint.__file__).parent)
    assert float(run.stdout) < 1.15
