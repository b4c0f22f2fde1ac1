"""model.py: a loaded model computes what the reference pipelines compute, and a saved one is theirs to open.

test_sample.py compares whole runs, from text to image, test_parity.py the networks."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import ROOT, edit, read, refusal, rewrite, same, write, write_tokenizer
from safetensors.torch import load_file, save_file

from model import MINIATURE, StableDiffusion, save_flow
from support.checks import check_scheduler
from support.official import SCHEDULER, SD15, flow_scheduler

load = StableDiffusion.load
PROMPTS = ["the red cat", "a ## on the cat, 2 of them!", "the " * 90]  # the last is longer than 77 tokens
WEIGHTS = "diffusion_pytorch_model.safetensors"


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def close(ours, theirs):
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pair(request):
    """Our model, and the reference's pipeline that it was saved from."""
    return load(request.getfixturevalue(request.param)), request.getfixturevalue(f"{request.param}_pipeline")


# ---- what it computes ----


def test_images_and_latents_are_scaled_as_the_reference_scales_them(pair):
    sd, pipeline = pair
    images, scale = draw(2, 3, 32, 32).clamp(-1, 1), pipeline.vae.config.scaling_factor
    distribution = pipeline.vae.encode(images).latent_dist
    mean, log_variance = sd.encode_moments(images)
    assert close(mean, distribution.mean) and close(log_variance, distribution.logvar)
    assert close(sd.encode(images), distribution.mean * scale)
    latents = draw(2, 4, 4, 4) * scale
    assert close(sd.decode(latents), pipeline.vae.decode(latents / scale).sample.clamp(-1, 1))


@pytest.mark.parametrize("zeros", [True, False])
def test_the_unconditional_text_of_sdxl_is_zeros_where_the_model_says_so(sdxl, sdxl_pipeline, zeros):
    sd = load(sdxl)
    sd.configs["model_index"]["force_zeros_for_empty_prompt"] = zeros
    context, pooled = sd.encode_prompt(["the red cat", ""])
    _, uncond, _, pooled_uncond = sdxl_pipeline.encode_prompt("the red cat", negative_prompt=None if zeros else "")
    assert context[1].any() == pooled[1].any() == (not zeros) and context[0].all() and pooled[0].all()
    assert close(context[1:], uncond) and close(pooled[1:], pooled_uncond)


# ---- memory and numbers ----


def test_images_pass_the_vae_a_few_at_a_time_which_changes_nothing(monkeypatch):
    sd, images = load(MINIATURE), draw(3, 3, 64, 64).clamp(-1, 1)
    for pixels, parts in (64, [5]), (256, [4, 1]), (1024, [1] * 5):
        for downscale in 1, 8:
            batch = torch.empty(5, 4, pixels // downscale, pixels // downscale, device="meta")
            assert [len(few) for few in sd.few_at_a_time(batch, downscale)] == parts
    moments, latents = sd.encode_moments(images), draw(3, 4, 8, 8)
    decoded, seen = sd.decode(latents), []

    def two_at_a_time(batch, downscale=1):
        seen.append(torch.backends.cudnn.allow_tf32)
        return batch.split(2)

    monkeypatch.setattr(sd, "few_at_a_time", two_at_a_time)
    torch.testing.assert_close(sd.encode_moments(images), moments, rtol=0, atol=1e-4)
    torch.testing.assert_close(sd.decode(latents), decoded, rtol=0, atol=1e-4)
    assert seen == [False, False]  # nor are they rounded on GPUs


def test_numbers_that_are_not_finite_never_become_an_image(capsys):
    sd, latents = load(MINIATURE), draw(1, 4, 8, 8)
    wanted = sd.decode(latents)
    sd.vae.half().decoder.conv_in.weight.mul_(2**14)  # overflows float16, not float32
    sd.vae.decoder.conv_in.bias.mul_(2**14)
    image = sd.decode(latents)
    assert image.isfinite().all() and (image - wanted).abs().mean() < 0.2  # a norm follows: the scale hardly matters
    assert "the VAE overflows in torch.float16; it runs in float32" in capsys.readouterr().err
    assert "the UNet's numbers are not finite" in refusal(sd.decode, latents * float("nan"))
    sd.vae.decoder.conv_out.bias.fill_(float("inf"))
    assert "the VAE's numbers are not finite" in refusal(sd.decode, latents)


@pytest.mark.slow
@pytest.mark.parametrize("said, kept", [(True, torch.float32), (None, torch.float32), (False, torch.float16)])
def test_a_vae_stays_in_float32_unless_it_says_that_float16_is_enough(sdxl_copy, sdxl, said, kept):
    # SDXL is published in both variants: the VAE then keeps the digits that float16 would lose
    for name in "unet", "vae":
        half = {key: tensor.half() for key, tensor in load_file(sdxl_copy / name / WEIGHTS).items()}
        save_file(half, sdxl_copy / name / "diffusion_pytorch_model.fp16.safetensors")
    edit(sdxl_copy / "vae/config.json", force_upcast=said)
    sd = load(sdxl_copy, dtype=torch.float16)
    assert sd.dtype == torch.float16 and sd.encode(draw(1, 3, 32, 32)).dtype == torch.float16
    stored = load_file(sdxl / "vae" / WEIGHTS)
    assert same(sd.vae.state_dict(), {key: weight.to(kept) for key, weight in stored.items()})


# ---- configs and tokenizers of other times and makers ----


@pytest.mark.slow
def test_configs_of_2022_leave_out_what_was_invented_later(sd15_copy, sd15):
    """The UNet's official settings alone, and those of the VAE but for the newer two."""
    for name, invented in ("unet", set()), ("vae", {"scaling_factor", "force_upcast"}):
        path = sd15_copy / name / "config.json"
        write(path, {field: value for field, value in read(path).items() if field in SD15[name].keys() - invented})
    old, new = load(sd15_copy), load(sd15)
    assert old.unet.cfg == new.unet.cfg and old.vae.cfg.scaling_factor == 0.18215


@pytest.mark.slow
def test_folders_that_others_left_behind(sdxl_copy, sdxl):
    """EMA's counters in the UNet's config, no architecture of the second encoder, an added word, the old end token."""
    edit(sdxl_copy / "unet/config.json", decay=0.9999, inv_gamma=1.0, optimization_step=5, use_ema_warmup=False)
    edit(sdxl_copy / "text_encoder_2/config.json", architectures=None, eos_token_id=2)
    vocabulary = len(read(write_tokenizer(sdxl_copy / "tokenizer") / "vocab.json"))
    write(sdxl_copy / "tokenizer/added_tokens.json", {"<word>": vocabulary})
    edit(sdxl_copy / "text_encoder/config.json", vocab_size=vocabulary + 1)
    table = "embeddings.token_embedding.weight"
    new = torch.ones(1, 32)
    rewrite(sdxl_copy / "text_encoder/model.safetensors", lambda t: t | {table: torch.cat([t[table], new])})
    sd = load(sdxl_copy)
    assert vocabulary in sd.tokenizers[0](["a <word> on"])
    for ours, wanted in zip(sd.encode_prompt(PROMPTS), load(sdxl).encode_prompt(PROMPTS)):
        assert torch.equal(ours, wanted)


# ---- flows ----


class Spy(torch.nn.Linear):
    def forward(self, z, t, *_):
        self.asked = t
        return z


@pytest.mark.parametrize(
    "settings, windows, prediction_type, shift",
    [
        ({"_class_name": "PeRFlowScheduler", "num_time_windows": 8, "prediction_type": "ddim_eps"}, 8, "ddim_eps", 0),
        ({"_class_name": "PeRFlowScheduler", "num_time_windows": 4, "prediction_type": "diff_eps"}, 4, "diff_eps", 0),
        ({"_class_name": "PeRFlowScheduler", "prediction_type": ...}, 4, "ddim_eps", 0),  # PeRFlow's defaults
        ({}, None, "ddim_eps", 1),  # a diffusion model
        ({"num_time_windows": 2}, 2, "ddim_eps", 1),  # trained here
    ],
)
def test_a_flow_says_in_its_scheduler_config_what_it_is_and_how_it_is_asked(
    pair, settings, windows, prediction_type, shift
):
    scheduler = {name: value for name, value in (SCHEDULER | settings).items() if value is not ...}
    check_scheduler(scheduler, "here")
    flow = StableDiffusion(pair[0].networks, [], pair[0].configs | {"scheduler": scheduler})
    assert (flow.windows, flow.prediction_type) == (windows, prediction_type)
    spy, tau = Spy(1, 1), torch.tensor([1000, 250])
    flow.epsilon((), unet=spy)(draw(2, 4, 8, 8), tau)
    assert torch.equal(spy.asked, tau - shift)


@pytest.mark.slow
def test_a_saved_flow_is_a_copy_that_needs_no_base_any_more(sd15_copy, sd15, tmp_path):
    edit(sd15_copy / "model_index.json", scheduler=["diffusers", "PNDMScheduler"], safety_checker=["x", "Checker"])
    base = load(sd15_copy)
    shutil.rmtree(sd15_copy)  # while it trains
    save_flow(base.unet, flow_scheduler(base, 4, guidance=3.0), base, tmp_path / "flow", torch.float16)
    flow, again = load(tmp_path / "flow", dtype=None), load(sd15)
    assert (flow.windows, flow.guidance, flow.dtype) == (4, 1.0, torch.float16)
    assert same(flow.unet.state_dict(), {key: weight.half() for key, weight in again.unet.state_dict().items()})
    assert same(flow.vae.state_dict(), again.vae.state_dict()) and base.dtype == torch.float32
    index = read(tmp_path / "flow/model_index.json")
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"] and index["safety_checker"] == [None, None]


# ---- saving ----


def test_a_saved_model_is_identical_to_us_and_to_the_reference(pair, tmp_path):
    (sd, pipeline), folder = pair, tmp_path / "a/b/model"  # the folders above are made, too
    before = os.umask(0o022)
    sd.save(folder)
    os.umask(before)
    again, opened = load(folder), DiffusionPipeline.from_pretrained(folder)
    for name, network in sd.networks.items():
        assert again.configs[name] == sd.configs[name] | ({"dtype": "float32"} if "text" in name else {})
        assert same(again.networks[name].state_dict(), network.state_dict())
        assert not again.networks[name].training and not any(w.requires_grad for w in network.parameters())
        assert same(getattr(opened, name).state_dict(), getattr(pipeline, name).state_dict())
    assert again.configs["scheduler"] == sd.configs["scheduler"]
    for ours, theirs in zip(again.tokenizers, sd.tokenizers):
        assert torch.equal(ours(PROMPTS), theirs(PROMPTS))
    assert {file.stat().st_mode & 0o777 for file in folder.rglob("*.*") if file.is_file()} == {0o644}


@pytest.mark.slow
def test_a_model_can_be_saved_over_the_files_it_still_reads(sd15_copy, sd15, monkeypatch):
    # loaded without conversion, the weights are views of the mapped files
    monkeypatch.chdir(sd15_copy)
    sd = load(".")
    sd.unet.to(memory_format=torch.channels_last)  # as trained on GPUs
    sd.unet.conv_in.weight.mul_(2)
    assert not torch.equal(load_file(sd15_copy / "unet" / WEIGHTS)["conv_in.weight"], sd.unet.conv_in.weight)
    sd.save(".")
    wanted = load_file(sd15 / "unet" / WEIGHTS)
    wanted["conv_in.weight"] *= 2
    assert same(sd.unet.state_dict(), wanted) and same(load_file(sd15_copy / "unet" / WEIGHTS), wanted)
    assert list(sd15_copy.parent.iterdir()) == [sd15_copy]


def test_save_replaces_nothing_but_a_model(sd15, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("years")
    (tmp_path / "file").write_text("not a folder")
    sd = load(sd15)
    for name in "work", "file", "work/thesis.txt":
        assert "exists and is not a model folder" in refusal(sd.save, tmp_path / name)
    assert (tmp_path / "work/thesis.txt").read_text() == "years"


# ---- what is refused ----


@pytest.mark.parametrize(
    "part", ["", "model_index.json", "scheduler", "unet", "vae", "text_encoder", "tokenizer", "unet/" + WEIGHTS]
)
def test_a_missing_part_is_named(sd15_copy, part):
    path = sd15_copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = refusal(load, sd15_copy)
    assert f"{sd15_copy} holds no tokenizer" in message or str(sd15_copy / part.partition("/")[0]) in message


@pytest.mark.slow
def test_parts_that_do_not_fit_are_refused(sd15_copy, sdxl, tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    write(folder / "vocab.json", read(folder / "vocab.json") | {"dog</w>": 523})
    assert "the tokenizer has 524 tokens" in refusal(load, sd15_copy, tokenizer=folder)
    edit(sd15_copy / "tokenizer/tokenizer_config.json", model_max_length=120)
    assert "120 tokens long, the text encoder takes 77; correct model_max_length" in refusal(load, sd15_copy)
    edit(sd15_copy / "unet/config.json", in_channels=9)
    rewrite(sd15_copy / "unet" / WEIGHTS, lambda tensors: tensors | {"conv_in.weight": torch.ones(8, 9, 3, 3)})
    message = refusal(load, sd15_copy, tokenizer=tokenizer)
    assert "the UNet maps 9 channels to 4, the latents have 4; only text-to-image" in message
    shutil.rmtree(sd15_copy / "unet")
    shutil.copytree(sdxl / "unet", sd15_copy / "unet")
    assert "the UNet expects text of width 80, not 32" in refusal(load, sd15_copy, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction' is not supported, only 'epsilon'"),
        ({"_class_name": "PeRFlowScheduler"}, "prediction_type = 'epsilon' is not supported, only 'ddim_eps' and"),
        ({"beta_schedule": ...}, "beta_schedule = left out, which means 'linear' is not supported"),
        ({"beta_end": 0.02}, "beta_end = 0.02 is not supported, only 0.012"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True is not supported, only False"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "the scheduler FlowMatchEulerDiscreteScheduler is not"),
        ({"num_time_windows": 0}, "num_time_windows = 0 is not a number from 1 to 1000"),
        ({"beta_start": "0.1"}, "beta_start = '0.1' is not"),
        ({"trained_guidance": "3"}, "trained_guidance = '3' is not a number"),
        ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": True}, None),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None}, None),
    ],
)
def test_only_the_noise_schedule_of_stable_diffusion_is_taken(settings, complaint):
    scheduler = {name: value for name, value in (SCHEDULER | settings).items() if value is not ...}
    if complaint is None:
        check_scheduler(scheduler, "here")
    else:
        assert complaint in refusal(check_scheduler, scheduler, "here")


@pytest.mark.slow
def test_loading_a_model_does_not_import_the_compiler():
    """It would be a third of the time from a program's start to its first image."""
    code = "import sys, model; model.StableDiffusion.load(model.MINIATURE); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
