"""layouts.py: our tensors are found in single files and old folders. The reference library's converters are the judge:
what is stored under our names for a single file, they must read back unchanged."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils as reference
from helpers import read, refusal, rewrite, same
from safetensors.torch import load_file, save_file

from model import NETWORKS, StableDiffusion
from support import layouts
from support.weights import build, read_config

load = StableDiffusion.load
BIG_G = "conditioner.embedders.1.model."
UNET_FILE = "diffusion_pytorch_model.safetensors"


def official_tensors(family, component):
    """The names and shapes of an official network's tensors; they take no memory."""
    network_class, config_class, _ = NETWORKS[component]
    config = read_config(config_class, layouts.OFFICIAL[family][component], component)
    return build(network_class, config).state_dict()


def named_as_single_file(family, component, tensors):
    """A network's tensors under the names that layouts.py knows for them. What changes their form is written out here,
    without its help."""
    stored = {}
    for key, (name, _) in layouts.sources_in_single_file(family, component, tensors).items():
        tensor = tensors[key]
        if "in_proj" in name:
            tensor = torch.cat([tensors[re.sub("[qkv]_proj", f"{part}_proj", key)] for part in "qkv"])
        elif component == "vae" and ".attentions." in key and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        elif key == "text_projection.weight":
            tensor = tensor.T
        stored[name] = tensor.contiguous()
    return stored


def read_back(component, stored):
    """What the reference library makes of a single file's tensors: a network's, under the names of the folders."""
    if component == "unet":
        sizes = "model.diffusion_model.label_emb.0.0.weight" in stored
        config = {"layers_per_block": 2, "addition_embed_type": "text_time" if sizes else None}
        return reference.convert_ldm_unet_checkpoint(stored, config)
    if component == "vae":
        return reference.convert_ldm_vae_checkpoint(stored, {"down_block_types": [0] * 4, "up_block_types": [0] * 4})
    if component == "text_encoder":
        return reference.convert_ldm_clip_checkpoint(stored)
    return reference.convert_open_clip_checkpoint(None, stored, BIG_G)


# ---- names ----


@pytest.mark.parametrize(
    "family, component, count, parameters",
    [
        ("SD1.5", "unet", 686, 859_520_964),
        ("SD1.5", "vae", 248, 83_653_863),
        ("SD1.5", "text_encoder", 196, 123_060_480),
        ("SDXL", "unet", 1680, 2_567_463_684),
        ("SDXL", "vae", 248, 83_653_863),
        ("SDXL", "text_encoder", 196, 123_060_480),
        ("SDXL", "text_encoder_2", 517, 694_659_840),
    ],
)
def test_the_reference_library_reads_our_names_of_every_official_tensor(family, component, count, parameters):
    official = official_tensors(family, component)
    assert len(official) == count and sum(tensor.numel() for tensor in official.values()) == parameters

    returned = read_back(component, named_as_single_file(family, component, official))
    assert {key: t.shape for key, t in returned.items()} == {key: t.shape for key, t in official.items()}

    # Many shapes are the same, so once more: each tensor is now one number, its own.
    numbered = {key: torch.full([1] * t.dim(), float(i)) for i, (key, t) in enumerate(official.items())}
    assert same(read_back(component, named_as_single_file(family, component, numbered)), numbered)


PUBLISHED = {
    ("SD1.5", "unet"): {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight":
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.3.resnets.1.time_emb_proj.bias": "input_blocks.11.0.emb_layers.1.bias",
        "mid_block.resnets.1.conv2.weight": "middle_block.2.out_layers.3.weight",
        "up_blocks.0.resnets.0.conv_shortcut.weight": "output_blocks.0.0.skip_connection.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
    },
    ("SDXL", "unet"): {
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.2.conv.weight",
        "add_embedding.linear_1.weight": "label_emb.0.0.weight",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj.weight":
            "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight",
        "conv_norm_out.weight": "out.0.weight",
    },
    ("SD1.5", "vae"): {
        "decoder.up_blocks.0.resnets.0.norm1.weight": "decoder.up.3.block.0.norm1.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.bias": "decoder.up.1.upsample.conv.bias",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias": "encoder.down.1.block.0.nin_shortcut.bias",
        "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
        "quant_conv.weight": "quant_conv.weight",
    },
    ("SD1.5", "text_encoder"): {"text_model.final_layer_norm.bias": "text_model.final_layer_norm.bias"},
    ("SDXL", "text_encoder"): {"text_model.final_layer_norm.bias": "text_model.final_layer_norm.bias"},
    ("SDXL", "text_encoder_2"): {
        "text_model.encoder.layers.0.self_attn.k_proj.weight": "transformer.resblocks.0.attn.in_proj_weight",
        "text_model.encoder.layers.31.mlp.fc2.bias": "transformer.resblocks.31.mlp.c_proj.bias",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_projection.weight": "text_projection",
    },
}  # fmt: skip
PREFIX = {
    ("SD1.5", "unet"): "model.diffusion_model.",
    ("SDXL", "unet"): "model.diffusion_model.",
    ("SD1.5", "vae"): "first_stage_model.",
    ("SD1.5", "text_encoder"): "cond_stage_model.transformer.",
    ("SDXL", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("SDXL", "text_encoder_2"): BIG_G,
}


@pytest.mark.parametrize("family, component", PUBLISHED)
def test_names_as_the_published_files_have_them(family, component):
    sources = layouts.sources_in_single_file(family, component, official_tensors(family, component))
    for ours, theirs in PUBLISHED[family, component].items():
        assert sources[ours][0] == PREFIX[family, component] + theirs


# ---- single files ----

# what the published single files hold besides the networks
BESIDES = {
    "SD1.5": {
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(8, 4, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    },
    "SDXL": {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
    },
}


@pytest.fixture(params=["SD1.5", "SDXL"])
def family(request):
    return request.param


@pytest.fixture
def folder(family, request):
    return request.getfixturevalue({"SD1.5": "sd15", "SDXL": "sdxl"}[family])


@pytest.fixture
def single_file(family, folder, tmp_path, monkeypatch):
    """A small model as a single file. Such a file does not say its sizes; so we make the small ones official."""
    sd = load(folder)
    small = copy.deepcopy(layouts.OFFICIAL[family])
    for component in sd.networks:
        sizes = small[component].keys() & sd.configs[component].keys() - {"eos_token_id"}
        small[component] |= {name: sd.configs[component][name] for name in sizes}
    monkeypatch.setitem(layouts.OFFICIAL, family, small)
    tensors = dict(BESIDES[family])
    for component, network in sd.networks.items():
        tensors |= named_as_single_file(family, component, network.state_dict())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def test_a_single_file_is_the_same_model_as_its_folder(single_file, folder):
    loaded, wanted = load(single_file, tokenizer=folder), load(folder)
    assert loaded.networks.keys() == wanted.networks.keys()
    for name, network in loaded.networks.items():
        assert same(network.state_dict(), wanted.networks[name].state_dict())
    assert torch.equal(loaded.encode_prompt(["the red cat"])[0], wanted.encode_prompt(["the red cat"])[0])


def test_community_merges_may_lack_a_prefix_in_their_text_encoder(single_file, folder):
    def shorten(tensors):
        return {name.replace(".transformer.text_model.", ".transformer."): w for name, w in tensors.items()}

    rewrite(single_file, shorten)
    loaded, wanted = load(single_file, tokenizer=folder), load(folder)
    assert same(loaded.text_encoders[0].state_dict(), wanted.text_encoders[0].state_dict())


def test_one_tokenizer_serves_both_encoders_of_sdxl(sdxl, tokenizer):
    # the second differs in its padding alone: "!" instead of the end token
    sd = load(sdxl, tokenizer=tokenizer)
    own = load(sdxl)
    assert torch.equal(sd.tokenizers[1](["red"]), own.tokenizers[1](["red"]))
    assert not torch.equal(sd.tokenizers[0](["red"]), sd.tokenizers[1](["red"]))


def test_convert_writes_a_single_file_as_a_folder(single_file, folder, tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["layouts.py", str(single_file), str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    )
    layouts.main()
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    converted, wanted = load(tmp_path / "out"), load(folder)
    for name, network in converted.networks.items():
        assert same(network.state_dict(), wanted.networks[name].state_dict())
    opened = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert same(opened.unet.state_dict(), wanted.unet.state_dict())


def test_a_folder_becomes_the_single_file_that_it_was(single_file, family, folder, tmp_path):
    load(folder).save(tmp_path / "again.safetensors")
    wanted = {name: tensor for name, tensor in load_file(single_file).items() if name not in BESIDES[family]}
    assert same(load_file(tmp_path / "again.safetensors"), wanted)
    assert [file.name for file in tmp_path.glob("again*")] == ["again.safetensors"]


def test_what_is_not_official_makes_no_single_file(folder, tmp_path):
    message = refusal(load(folder).save, tmp_path / "again.safetensors")
    assert "a single file cannot tell what it is" in message and not list(tmp_path.glob("again*"))


def test_a_single_file_that_cannot_be_written_is_refused(single_file, folder, tmp_path):
    (tmp_path / "again.safetensors").mkdir()
    assert "cannot write" in refusal(load(folder).save, tmp_path / "again.safetensors")


def test_a_single_file_needs_a_tokenizer(single_file):
    assert "a single file holds no tokenizer; give the folder of one" in refusal(load, single_file)


def test_a_single_file_that_has_lost_a_tensor_is_refused_by_name(single_file, tokenizer):
    rewrite(single_file, lambda tensors: {k: t for k, t in tensors.items() if k != "first_stage_model.quant_conv.bias"})
    assert "vae: the tensors do not fit the config: 1 missing (first_stage_model.quant_conv.bias)" in refusal(
        load, single_file, tokenizer=tokenizer
    )


def test_an_inpainting_single_file_is_refused(single_file, tokenizer):
    # its UNet sees latents, masked latents and mask: 4 + 4 + 1 channels
    name = "model.diffusion_model.input_blocks.0.0.weight"
    rewrite(single_file, lambda tensors: tensors | {name: torch.ones(8, 9, 3, 3)})
    assert f"{name} is (8, 9, 3, 3), should be (8, 4, 3, 3)" in refusal(load, single_file, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "names, complaint",
    [
        ("model.diffusion_model.x first_stage_model.x cond_stage_model.model.x", "a Stable Diffusion 2 checkpoint"),
        ("model.diffusion_model.x first_stage_model.x conditioner.embedders.0.model.x", "the SDXL refiner"),
        ("model.diffusion_model.x v_pred", "predicts v, not epsilon"),
        ("model.diffusion_model.x", "the file has no vae"),
        ("model.diffusion_model.x first_stage_model.x", "the file has no text_encoder"),
        ("conv_in.weight", "the file has no unet (no tensor begins with model.diffusion_model.)"),
        ("", "the file has no unet"),
    ],
)
def test_other_single_files_are_refused_for_what_they_are(tmp_path, names, complaint):
    save_file({name: torch.zeros(1) for name in names.split()}, tmp_path / "m.safetensors")
    assert complaint in refusal(load, tmp_path / "m.safetensors")


# ---- folders of other times ----


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_vae_folders_until_2023_have_other_names_for_attention(sd15_copy, sd15, as_convolutions):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(tensors):
        renamed = {}
        for key, tensor in tensors.items():
            if ".attentions." in key:
                for new, name in old.items():
                    key = key.replace(new, name)
                if as_convolutions and tensor.dim() == 2:
                    tensor = tensor[:, :, None, None]
            renamed[key] = tensor
        return renamed

    rewrite(sd15_copy / "vae" / UNET_FILE, rename)
    assert same(load(sd15_copy).vae.state_dict(), load(sd15).vae.state_dict())


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_are_written_with_and_without_a_prefix(sd15_copy, sd15, prefix):
    def rename(tensors):
        return {prefix + key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}

    rewrite(sd15_copy / "text_encoder/model.safetensors", rename)
    assert same(load(sd15_copy).text_encoders[0].state_dict(), load(sd15).text_encoders[0].state_dict())


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_old_text_encoders_hold_a_counter_that_is_no_parameter(sd15_copy, sd15, prefix):
    def add(tensors):
        named = {prefix + key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
        return named | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}

    rewrite(sd15_copy / "text_encoder/model.safetensors", add)
    assert same(load(sd15_copy).text_encoders[0].state_dict(), load(sd15).text_encoders[0].state_dict())


# ---- weight differences ----


@pytest.fixture
def delta(sd15, tmp_path):
    tensors = load_file(sd15 / "unet" / UNET_FILE)
    file = tmp_path / "delta.safetensors"
    save_file({key: torch.full_like(tensor, 0.25) for key, tensor in tensors.items()}, file)
    return file


def test_base_and_difference_make_a_flow(sd15, delta, tmp_path, monkeypatch):
    argv = ["layouts.py", sd15, tmp_path / "flow", "--delta", delta, "--windows", "4", "--prediction-type", "diff_eps"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    layouts.main()
    flow, base = load(tmp_path / "flow"), load(sd15)
    assert flow.windows == 4 and flow.prediction_type == "diff_eps" and base.windows is None
    assert read(tmp_path / "flow/scheduler/scheduler_config.json")["_class_name"] == "PeRFlowScheduler"
    assert same(flow.unet.state_dict(), {key: w + 0.25 for key, w in base.unet.state_dict().items()})
    assert same(flow.vae.state_dict(), base.vae.state_dict())
    assert same(DiffusionPipeline.from_pretrained(tmp_path / "flow").unet.state_dict(), flow.unet.state_dict())


def test_a_difference_is_added_in_float32_and_rounded_once(sd15, delta):
    sd, base = load(sd15, dtype=torch.float16), load(sd15, dtype=torch.float16).unet.conv_in.weight
    add_delta(sd, delta, windows=4, prediction_type="ddim_eps")
    assert torch.equal(sd.unet.conv_in.weight, (base.float() + 0.25).half())


def test_a_difference_of_another_network_is_refused(sd15, delta):
    rewrite(delta, lambda tensors: tensors | {"conv_in.weight": torch.ones(8, 9, 3, 3)})
    assert "conv_in.weight is (8, 9, 3, 3)" in refusal(add_delta, load(sd15), delta, 4, "diff_eps")


def test_a_flow_becomes_the_difference_that_it_was_made_of(sd15, delta, tmp_path, monkeypatch, capsys):
    argv = ["layouts.py", sd15, tmp_path / "flow", "--delta", delta, "--windows", "4", "--prediction-type", "diff_eps"]
    again = ["layouts.py", tmp_path / "flow", tmp_path / "again.safetensors", "--difference-from", sd15]
    for command in argv, again:
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        layouts.main()
    found, wanted = load_file(tmp_path / "again.safetensors"), load_file(delta)
    assert found.keys() == wanted.keys()
    for key, difference in wanted.items():
        torch.testing.assert_close(found[key], difference, rtol=0, atol=1e-6)
    assert "does not say that it is a flow of 4 windows, diff_eps" in capsys.readouterr().out


def test_a_difference_needs_two_of_a_kind(sd15, sdxl, tmp_path):
    assert "not built alike" in refusal(save_delta, load(sdxl), load(sd15), tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())


# ---- the command ----


def run(*arguments):
    command = [sys.executable, layouts.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_ends_with_one_line_and_code_2_when_it_cannot_go_on(tmp_path):
    result = run(tmp_path / "nothing.safetensors", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'nothing.safetensors'} does not exist; check the path\n"
    assert not (tmp_path / "out").exists()


def test_a_difference_needs_to_be_told_what_it_is(sd15, delta, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layouts.py", str(sd15), str(tmp_path / "out"), "--delta", str(delta)])
    with pytest.raises(SystemExit, match="2"):
        layouts.main()
    assert "--delta also needs --windows and --prediction-type" in capsys.readouterr().err


def test_a_difference_is_written_into_one_file(sd15, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layouts.py", str(sd15), str(tmp_path / "out"), "--difference-from", str(sd15)])
    with pytest.raises(SystemExit, match="2"):
        layouts.main()
    assert "let OUT end in .safetensors" in capsys.readouterr().err
