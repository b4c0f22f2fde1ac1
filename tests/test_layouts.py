"""layouts.py: our tensors are found in single files and old folders. The reference library's converters are the judge:
what is stored under our names for a single file, they must read back unchanged."""

import copy

import pytest
import torch
from diffusers.loaders import single_file_utils as reference
from helpers import exit_code, refusal, rewrite, same
from safetensors.torch import load_file, save_file

from model import NETWORKS, StableDiffusion, alphas_cumprod
from support import layouts, official
from support.official import flow_scheduler
from support.weights import build, read_config
from tools import convert

load = StableDiffusion.load
BIG_G = "conditioner.embedders.1.model."
UNET_FILE = "diffusion_pytorch_model.safetensors"


def official_tensors(family, component):
    """The names and shapes of an official network's tensors; they take no memory."""
    network_class, config_class = NETWORKS[component]
    config = read_config(config_class, official.OFFICIAL[family][component], component)
    return build(network_class, config).state_dict()


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


@pytest.mark.slow
@pytest.mark.parametrize("family, component", [(f, c) for f, parts in layouts.PREFIXES.items() for c in parts])
def test_the_reference_library_reads_our_names_of_every_official_tensor(family, component):
    official = official_tensors(family, component)
    returned = read_back(component, layouts.as_single_file(family, component, official))
    assert {key: t.shape for key, t in returned.items()} == {key: t.shape for key, t in official.items()}
    # Many shapes are the same, so once more with numbers, which also tell whether a matrix is transposed.
    numbers = {key: torch.rand([2] * t.dim()) for key, t in official.items()}
    assert same(read_back(component, layouts.as_single_file(family, component, numbers)), numbers)


# ---- single files ----

# what the published single files hold besides the networks, and what training or converting them may leave in them
ABAR, TEXT = alphas_cumprod(official.SCHEDULER), "cond_stage_model.transformer."
BESIDES = {
    "SD1.5": {
        "alphas_cumprod": ABAR.half(),
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(8, 4, 3, 3),
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4),
        "first_stage_model.model_ema.num_updates": torch.tensor(3),
        TEXT + "text_model.embeddings.position_ids": torch.arange(77)[None],
        TEXT + "text_projection.weight": torch.eye(32),
        TEXT + "vision_model.embeddings.class_embedding": torch.ones(8),
        TEXT + "visual_projection.weight": torch.ones(8, 8),
    },
    "SDXL": {BIG_G + "logit_scale": torch.tensor(4.6), "denoiser.sigmas": ((1 - ABAR) / ABAR).sqrt()},
}


@pytest.fixture(scope="module", params=["SD1.5", "SDXL"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, sd15, sdxl):
    return sd15 if family == "SD1.5" else sdxl


@pytest.fixture(scope="module")
def single(family, folder, tmp_path_factory):
    """A small model and its single file. Such a file does not say its sizes; so we make the small ones official."""
    sd = load(folder)
    small = copy.deepcopy(official.OFFICIAL[family])
    for component in sd.networks:
        sizes = small[component].keys() & sd.configs[component].keys() - {"eos_token_id"}
        small[component] |= {name: sd.configs[component][name] for name in sizes}
    tensors = dict(BESIDES[family])
    for component, network in sd.networks.items():
        tensors |= layouts.as_single_file(family, component, network.state_dict())
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(tensors, file, {"format": "pt", "modelspec.prediction_type": "epsilon"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(official.OFFICIAL, family, small)
        yield sd, file


def same_model(model, other):
    return all(same(n.state_dict(), other.networks[name].state_dict()) for name, n in model.networks.items())


def spelled_otherwise(name, tensor):
    """As converters have written them: under other names, transposed, or in another shape."""
    if "attn_1" in name:
        for usual, other in (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0."):
            name = name.replace(usual, other)
        return name, tensor.flatten(1) if tensor.dim() == 4 else tensor
    if name.endswith("text_projection"):
        return f"{name}.weight", tensor.T.contiguous()
    if "proj_in.weight" in name or "proj_out.weight" in name:
        return name, tensor[:, :, None, None] if tensor.dim() == 2 else tensor.flatten(1)
    return name.replace(".transformer.text_model.", ".transformer."), tensor


@pytest.mark.slow
@pytest.mark.parametrize("spell", [lambda *published: published, spelled_otherwise])
def test_a_single_file_in_any_spelling_is_the_same_model_as_its_folder(single, folder, tmp_path, spell):
    sd, file = single
    save_file(dict(spell(*item) for item in load_file(file).items()), tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", tokenizer=folder)
    assert loaded.networks.keys() == sd.networks.keys() and same_model(loaded, sd)


@pytest.mark.slow
def test_one_tokenizer_serves_both_encoders_of_sdxl(sdxl, tokenizer):
    # the second differs in its padding alone: "!" instead of the end token
    sd, own = load(sdxl, tokenizer=tokenizer), load(sdxl)
    assert torch.equal(sd.tokenizers[1](["red"]), own.tokenizers[1](["red"]))
    assert not torch.equal(sd.tokenizers[0](["red"]), sd.tokenizers[1](["red"]))


@pytest.mark.slow
def test_convert_writes_a_single_file_as_a_folder_and_back(single, family, tmp_path, tokenizer, capsys):
    sd, file = single
    assert exit_code(convert, file, tmp_path / "out", "--tokenizer", tokenizer) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    assert same_model(load(tmp_path / "out"), sd)
    assert exit_code(convert, tmp_path / "out", tmp_path / "again.safetensors") == 0
    wanted = {name: tensor for name, tensor in load_file(file).items() if name not in BESIDES[family]}
    assert same(load_file(tmp_path / "again.safetensors"), wanted)
    (tmp_path / "taken.safetensors").mkdir()
    assert "cannot write" in refusal(sd.save, tmp_path / "taken.safetensors")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "ddim_eps"])
def test_a_flow_stays_one_as_a_single_file(single, tmp_path, tokenizer, prediction_type):
    """By our metadata; or, where other tools have lost it, by what the user says."""
    sd, file = single
    options = ["--windows", 4, "--prediction-type", prediction_type]
    assert exit_code(convert, file, tmp_path / "flow.safetensors", "--tokenizer", tokenizer, *options) == 0
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / "flow.safetensors"), bare)
    for source, said in (tmp_path / "flow.safetensors", []), (bare, options):
        assert exit_code(convert, source, tmp_path / "out", "--tokenizer", tokenizer, *said) == 0
        assert load(tmp_path / "out").configs["scheduler"] == flow_scheduler(sd, 4, prediction_type=prediction_type)
        assert load(tmp_path / "out").windows == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, setting, value", [("vae", "scaling_factor", 0.5), ("unet", "attention_head_dim", [1] * 4)]
)
def test_what_is_not_official_makes_no_single_file(sd15, tmp_path, part, setting, value):
    sd = load(sd15)
    message = refusal(sd.save, tmp_path / "again.safetensors")
    assert "a single file cannot tell what it is" in message and not list(tmp_path.glob("again*"))
    with pytest.MonkeyPatch.context() as patch:  # even where all shapes are official
        changed = copy.deepcopy(official.SD15)
        for name in sd.networks:
            changed[name] |= {k: v for k, v in sd.configs[name].items() if k in changed[name]}
        changed[part][setting] = value
        patch.setitem(official.OFFICIAL, "SD1.5", changed)
        assert f"the {part} is none of SD1.5 ({setting})" in refusal(sd.save, tmp_path / "again.safetensors")


def test_a_single_file_holds_no_tokenizer_and_no_variants(single, tokenizer):
    assert "a single file holds no tokenizer; give the folder of one" in refusal(load, single[1])
    assert "has no variants" in refusal(load, single[1], tokenizer=tokenizer, variant="fp16")


SD, XL = [" ".join(prefix + "x" for prefix in layouts.PREFIXES[family].values()) for family in ("SD1.5", "SDXL")]
ZERO_SNR = torch.linspace(0.999, 0, 1000)


@pytest.mark.parametrize(
    "names, metadata, complaint",
    [
        ("model.diffusion_model.x first_stage_model.x cond_stage_model.model.x", {}, "this is Stable Diffusion 2"),
        ("lora_unet_x", {}, "a LoRA"),
        (XL + " v_pred ztsnr", {}, "predicts v, not epsilon"),
        ("model.diffusion_model.x", {}, "the file has no vae"),
        ("conv_in.weight", {}, "the file has no unet (no tensor begins with model.diffusion_model.)"),
        (XL, {"modelspec.prediction_type": "v"}, "its metadata says modelspec.prediction_type = v"),
        (SD, {"ss_v_parameterization": "True"}, "ss_v_parameterization = True"),
        (SD, {"scheduler.num_time_windows": "{"}, "the scheduler settings in its metadata are damaged"),
        (SD, {"scheduler.num_time_windows": '"four"'}, "num_time_windows = 'four' is not a number from 1 to 1000"),
        (SD + " alphas_cumprod", {}, "its alphas_cumprod is another noise schedule"),
    ],
)
def test_other_single_files_are_refused_for_what_they_are(tmp_path, names, metadata, complaint):
    save_file({name: ZERO_SNR.clone() for name in names.split()}, tmp_path / "m.safetensors", metadata)
    assert complaint in refusal(load, tmp_path / "m.safetensors")


# ---- folders of other times ----


def old_vae(name):
    for usual, old in (".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."):
        name = name.replace(usual, old)
    return name


@pytest.mark.parametrize(
    "part, rename",
    [
        ("vae", old_vae),  # until 2023
        ("text_encoder", lambda name: name.removeprefix("text_model.")),
        ("text_encoder", lambda name: "text_model." + name.removeprefix("text_model.")),
    ],
)
def test_folders_of_other_times_have_other_names(sd15, part, rename):
    network = load(sd15).networks[part].state_dict()
    stored = {rename(name) for name in network}
    assert {name for name, _ in layouts.sources_in_folder(network, stored).values()} == stored


# ---- weight differences ----


@pytest.fixture
def delta(sd15, tmp_path):
    tensors = load_file(sd15 / "unet" / UNET_FILE)
    file = tmp_path / "delta.safetensors"
    save_file({key: torch.full_like(tensor, 0.25) for key, tensor in tensors.items()}, file)
    return file


@pytest.mark.slow
def test_base_and_difference_make_a_flow_and_the_flow_the_difference(sd15, delta, tmp_path):
    options = ["--delta", delta, "--windows", 4, "--prediction-type", "diff_eps"]
    assert exit_code(convert, sd15, tmp_path / "flow", *options) == 0
    flow, base = load(tmp_path / "flow"), load(sd15)
    assert flow.windows == 4 and flow.prediction_type == "diff_eps" and base.windows is None
    assert same(flow.unet.state_dict(), {key: w + 0.25 for key, w in base.unet.state_dict().items()})
    assert same(flow.vae.state_dict(), base.vae.state_dict())
    again = tmp_path / "again.safetensors"
    assert exit_code(convert, tmp_path / "flow", again, "--difference-from", sd15) == 0
    found, wanted = load_file(again), load_file(delta)
    assert found.keys() == wanted.keys()
    for key, difference in wanted.items():
        torch.testing.assert_close(found[key], difference, rtol=0, atol=1e-6)
    assert "is a flow of 4 windows already" in refusal(convert.add_delta, flow, delta)
    assert "a flow of 4 windows, diff_eps, already" in refusal(convert.declare_flow, flow, 2, "diff_eps")


@pytest.mark.slow
def test_a_difference_is_added_in_float32_and_rounded_once_where_little_is_lost(sd15, delta):
    sd, base = load(sd15, dtype=torch.float16), load(sd15, dtype=torch.float16).unet.conv_in.weight
    convert.add_delta(sd, delta)
    assert torch.equal(sd.unet.conv_in.weight, (base.float() + 0.25).half())
    rewrite(delta, lambda tensors: {name: 1e-4 * tensor for name, tensor in tensors.items()})
    assert "of the difference would be lost; add it to a base stored in float32" in refusal(
        convert.add_delta, load(sd15, dtype=torch.bfloat16), delta
    )


@pytest.mark.slow
def test_a_difference_needs_two_of_a_kind(sd15, sdxl, delta, tmp_path):
    assert "not built alike" in refusal(convert.save_delta, load(sdxl), load(sd15), tmp_path / "new.safetensors")
    rewrite(delta, lambda tensors: tensors | {"conv_in.weight": torch.ones(8, 9, 3, 3)})
    assert "conv_in.weight is (8, 9, 3, 3)" in refusal(convert.add_delta, load(sd15), delta)


# ---- the command ----


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--delta", "F"], "a flow needs both --windows and --prediction-type"),
        (["--windows", 4], "a flow needs both --windows and --prediction-type"),
        (["--prediction-type", "epsilon"], "a flow needs both --windows and --prediction-type"),
        (["--difference-from", "BASE"], "let OUT end in .safetensors"),
        (["--windows", 0, "--prediction-type", "epsilon"], "num_time_windows = 0 is not a number from 1 to 1000"),
        (["--variant", "v0"], "has no weights of variant 'v0'"),
    ],
)
def test_options_without_an_effect_are_errors(sd15, tmp_path, options, complaint, capsys):
    assert exit_code(convert, sd15, tmp_path / "out", *options) == 2
    assert complaint in capsys.readouterr().err and not (tmp_path / "out").exists()
