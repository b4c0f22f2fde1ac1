"""model.py: a loaded model computes what the reference pipelines compute, and a saved one is theirs to open."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import edit, read, refusal, rewrite, same, write, write_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import MINIATURE, StableDiffusion

load = StableDiffusion.load
PROMPTS = ["the red cat", "a ## on the cat, 2 of them!", "the " * 90]  # the last is longer than 77 tokens
WEIGHTS = "diffusion_pytorch_model.safetensors"


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def close(ours, theirs):
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.fixture(params=["sd15", "sdxl"])
def pair(request):
    """Our model, and the reference's pipeline that it was saved from."""
    return load(request.getfixturevalue(request.param)), request.getfixturevalue(f"{request.param}_pipeline")


def reference_text(pipeline, prompts):
    """Context and, of SDXL, the pooled vector, without the unconditional ones."""
    texts = pipeline.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return texts[::2]


# ---- what it computes ----


def test_the_unet_predicts_what_the_reference_predicts(pair):
    sd, pipeline = pair
    x, t, context = draw(2, 4, 8, 8), torch.tensor([7, 903]), draw(2, 77, sd.unet.cfg.cross_attention_dim)
    pooled, extra = None, None
    if len(sd.text_encoders) == 2:
        pooled = draw(2, 48)
        sizes = pipeline._get_add_time_ids((64, 48), (0, 0), (64, 48), torch.float32, 48)
        extra = {"text_embeds": pooled, "time_ids": sizes.expand(2, -1)}
    theirs = pipeline.unet(x, t, encoder_hidden_states=context, added_cond_kwargs=extra).sample
    assert close(sd.unet(x, t, context, pooled, sd.time_ids(2, height=64, width=48)), theirs)


def test_images_and_latents_are_scaled_as_the_reference_scales_them(pair):
    sd, pipeline = pair
    images, scale = draw(2, 3, 32, 32).clamp(-1, 1), pipeline.vae.config.scaling_factor
    distribution = pipeline.vae.encode(images).latent_dist
    assert close(sd.encode(images), distribution.mode() * scale)
    drawn = distribution.sample(torch.Generator().manual_seed(5)) * scale
    assert close(sd.encode(images, torch.Generator().manual_seed(5)), drawn)
    latents = draw(2, 4, 4, 4) * scale
    assert close(sd.decode(latents), pipeline.vae.decode(latents / scale).sample.clamp(-1, 1))


def test_sd15_reads_the_last_hidden_state_after_the_final_norm(sd15, sd15_pipeline):
    context, pooled = load(sd15).encode_prompt([*PROMPTS, ""])
    assert context.shape == (4, 77, 32) and pooled is None
    assert close(context, reference_text(sd15_pipeline, [*PROMPTS, ""])[0])


def test_sdxl_reads_both_second_to_last_hidden_states_and_one_pooled_vector(sdxl, sdxl_pipeline):
    context, pooled = load(sdxl).encode_prompt(PROMPTS)
    theirs, pooled_theirs = reference_text(sdxl_pipeline, PROMPTS)
    assert context.shape == (3, 77, 80) and pooled.shape == (3, 48)
    assert close(context, theirs) and close(pooled, pooled_theirs)


def test_the_unconditional_text_of_sdxl_is_zeros(sdxl, sdxl_pipeline):
    context, pooled = load(sdxl).encode_prompt(["the red cat", ""])
    _, negative, _, negative_pooled = sdxl_pipeline.encode_prompt("the red cat", do_classifier_free_guidance=True)
    assert not context[1].any() and not pooled[1].any() and context[0].all() and pooled[0].all()
    assert torch.equal(context[1:], negative) and torch.equal(pooled[1:], negative_pooled)


def test_the_unconditional_text_is_encoded_where_the_model_says_so(sdxl_copy, sdxl_pipeline):
    edit(sdxl_copy / "model_index.json", force_zeros_for_empty_prompt=False)
    context, pooled = load(sdxl_copy).encode_prompt([""])
    theirs, pooled_theirs = reference_text(sdxl_pipeline, [""])
    assert pooled.any() and close(context, theirs) and close(pooled, pooled_theirs)


def test_eos_token_id_2_of_old_configs_means_the_largest_id(sdxl_copy, sdxl_pipeline):
    edit(sdxl_copy / "text_encoder_2/config.json", eos_token_id=2)
    sd = load(sdxl_copy)
    assert 2 in sd.tokenizers[1](PROMPTS)  # a token like any other: "#"
    assert close(sd.encode_prompt(PROMPTS)[1], reference_text(sdxl_pipeline, PROMPTS)[1])


def test_the_noise_schedule_is_the_official_one(sd15, sd15_pipeline):
    ours, theirs = load(sd15).alphas_cumprod, sd15_pipeline.scheduler.alphas_cumprod
    assert ours.shape == (1000,) and torch.allclose(ours, theirs, rtol=1e-4)
    assert np.isclose(ours[0], 0.99915) and np.isclose(ours[999], 0.00466, rtol=1e-3)


# ---- configs and tokenizers of other times ----


def test_configs_of_2022_leave_out_what_was_invented_later(sd15_copy, sd15):
    """The fields of SD1.5's published config files, and no others."""
    kept = {
        "unet": "_class_name act_fn attention_head_dim block_out_channels center_input_sample cross_attention_dim "
        "down_block_types downsample_padding flip_sin_to_cos freq_shift in_channels layers_per_block "
        "mid_block_scale_factor norm_eps norm_num_groups out_channels sample_size up_block_types",
        "vae": "_class_name act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block "
        "norm_num_groups out_channels sample_size up_block_types",
    }
    for name, fields in kept.items():
        path = sd15_copy / name / "config.json"
        write(path, {field: value for field, value in read(path).items() if field in fields.split()})
    old, new = load(sd15_copy), load(sd15)
    assert old.unet.cfg == new.unet.cfg and old.vae.cfg.scaling_factor == 0.18215


def test_attention_head_dim_is_the_number_of_heads(sd15, sd15_pipeline):
    assert read(sd15 / "unet/config.json")["attention_head_dim"] == 2
    attentions = [block.attentions[0].transformer_blocks[0].attn1 for block in load(sd15).unet.down_blocks[:3]]
    assert [attention.heads for attention in attentions] == [2, 2, 2]  # at widths 8, 16, 32
    theirs = sd15_pipeline.unet.down_blocks[2].attentions[0].transformer_blocks[0].attn1
    assert (theirs.heads, theirs.to_q.out_features) == (2, 32)


def test_both_forms_of_a_tokenizer_give_the_same_ids(sd15, sd15_copy):
    # the library now writes a tokenizer.json, and in 2022 wrote vocab.json and merges.txt
    assert not (sd15 / "tokenizer/vocab.json").exists()
    write_tokenizer(sd15_copy / "tokenizer")
    assert torch.equal(load(sd15).tokenizers[0](PROMPTS), load(sd15_copy).tokenizers[0](PROMPTS))


def test_a_vae_that_overflows_float16_stays_in_float32(sdxl_copy, sdxl):
    # SDXL is published in both variants: the VAE then keeps the digits that float16 would lose
    for name in "unet", "vae":
        half = {key: tensor.half() for key, tensor in load_file(sdxl_copy / name / WEIGHTS).items()}
        save_file(half, sdxl_copy / name / "diffusion_pytorch_model.fp16.safetensors")
    sd = load(sdxl_copy, dtype=torch.float16)
    assert sd.dtype == torch.float16
    assert same(sd.vae.state_dict(), load_file(sdxl / "vae" / WEIGHTS))
    assert sd.encode(draw(1, 3, 32, 32)).dtype == torch.float16
    assert load(sdxl_copy, dtype=torch.bfloat16).vae.quant_conv.weight.dtype == torch.bfloat16


# ---- flows ----


@pytest.mark.parametrize(
    "settings, windows, prediction_type",
    [
        ({"num_time_windows": 8, "prediction_type": "ddim_eps"}, 8, "ddim_eps"),
        ({"num_time_windows": 4, "prediction_type": "diff_eps"}, 4, "diff_eps"),
        ({"prediction_type": None}, 4, "ddim_eps"),  # PeRFlow's defaults
    ],
)
def test_a_flow_says_so_in_its_scheduler_config(sd15_copy, settings, windows, prediction_type):
    edit(sd15_copy / "scheduler/scheduler_config.json", _class_name="PeRFlowScheduler", **settings)
    sd = load(sd15_copy)
    assert (sd.windows, sd.prediction_type) == (windows, prediction_type)


def test_a_diffusion_model_has_no_windows(sd15):
    sd = load(sd15)
    assert (sd.windows, sd.prediction_type) == (None, "epsilon")


# ---- saving ----


def test_save_and_load_again_is_identical(pair, tmp_path):
    sd, _ = pair
    sd.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.configs == sd.configs
    for name, network in sd.networks.items():
        assert same(again.networks[name].state_dict(), network.state_dict())
    for ours, theirs in zip(again.tokenizers, sd.tokenizers):
        assert torch.equal(ours(PROMPTS), theirs(PROMPTS))


def test_the_reference_library_opens_what_we_save(pair, tmp_path):
    sd, pipeline = pair
    sd.save(tmp_path / "saved")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    for name in sd.networks:
        assert same(getattr(opened, name).state_dict(), getattr(pipeline, name).state_dict())
    images = [
        pipe(
            "the red cat", height=64, width=64, num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        for pipe in (opened, pipeline)
    ]  # fmt: skip
    assert np.allclose(*images, atol=1e-5) and images[0].std() > 0.01


def test_save_takes_the_place_of_an_older_model(sd15_copy, sdxl):
    load(sdxl).save(sd15_copy)
    assert len(load(sd15_copy).text_encoders) == 2
    assert list(sd15_copy.parent.iterdir()) == [sd15_copy]


def test_a_model_can_be_saved_over_the_files_it_still_reads(sd15_copy, sd15):
    # loaded without conversion, the weights are views of the mapped files
    sd = load(sd15_copy)
    sd.unet.conv_in.weight.mul_(2)
    sd.save(sd15_copy)
    wanted = load_file(sd15 / "unet" / WEIGHTS)
    wanted["conv_in.weight"] *= 2
    assert same(sd.unet.state_dict(), wanted) and same(load(sd15_copy).unet.state_dict(), wanted)


def test_changing_a_loaded_weight_does_not_change_its_file(sd15_copy, sd15):
    load(sd15_copy).unet.conv_in.weight.zero_()
    assert load(sd15_copy).unet.conv_in.weight.any()


def test_weights_in_another_memory_format_are_saved_too(sd15, tmp_path):
    sd = load(sd15)
    sd.unet.to(memory_format=torch.channels_last)  # as trained on GPUs
    sd.save(tmp_path / "saved")
    assert same(load(tmp_path / "saved").unet.state_dict(), load(sd15).unet.state_dict())


def test_save_replaces_nothing_but_a_model(sd15, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("years")
    (tmp_path / "file").write_text("not a folder")
    for name in "work", "file", "work/thesis.txt":
        assert "exists and is not a model folder" in refusal(load(sd15).save, tmp_path / name)
    assert (tmp_path / "work/thesis.txt").read_text() == "years"


def test_save_leaves_the_neighbors_alone(sd15, tmp_path):
    for name in "model", "model.old":
        load(sd15).save(tmp_path / name)
    load(sd15).save(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.old"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), SafetensorError("I/O error"), KeyboardInterrupt])
def test_save_is_all_or_nothing(sd15_copy, sdxl, error, monkeypatch):
    def fail_on_the_vae(tensors, file, metadata):
        if "vae" in str(file):
            raise error
        save_file(tensors, file, metadata)

    monkeypatch.setattr("support.files.save_file", fail_on_the_vae)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            load(sdxl).save(sd15_copy)
    else:
        assert f"cannot write {sd15_copy}: {error}" in refusal(load(sdxl).save, sd15_copy)
    assert len(load(sd15_copy).text_encoders) == 1  # the older one, whole
    assert list(sd15_copy.parent.iterdir()) == [sd15_copy]


def test_saved_files_can_be_read_by_whom_the_umask_lets(sd15, tmp_path):
    before = os.umask(0o022)
    load(sd15).save(tmp_path / "model")
    os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").rglob("*.*") if file.is_file()} == {0o644}


def test_save_makes_the_folders_above_and_takes_relative_paths(sd15, tmp_path, monkeypatch):
    load(sd15).save(tmp_path / "a/b/model")
    monkeypatch.chdir(tmp_path / "a/b/model")
    load(".").save(".")
    assert same(load(tmp_path / "a/b/model").unet.state_dict(), load(sd15).unet.state_dict())


# ---- what is refused ----


def test_what_does_not_exist_is_named(tmp_path):
    assert f"{tmp_path / 'nothing'} does not exist" in refusal(load, tmp_path / "nothing")
    assert f"{tmp_path / 'model_index.json'} is missing" in refusal(load, tmp_path)


@pytest.mark.parametrize("part", ["model_index.json", "scheduler", "unet", "vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named(sd15_copy, part):
    path = sd15_copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = refusal(load, sd15_copy)
    assert str(sd15_copy / part) in message or part == "tokenizer" and "holds no tokenizer" in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_named(sd15_copy, part):
    next((sd15_copy / part).glob("*.safetensors")).unlink()
    assert f"{sd15_copy / part} has no weights" in refusal(load, sd15_copy)


def test_a_refiner_is_refused(sdxl_copy):
    # it has only SDXL's second text encoder
    edit(sdxl_copy / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    shutil.rmtree(sdxl_copy / "text_encoder")
    assert f"{sdxl_copy / 'text_encoder/config.json'} is missing" in refusal(load, sdxl_copy)


def test_an_inpainting_model_is_refused(sd15_copy):
    edit(sd15_copy / "unet/config.json", in_channels=9)
    rewrite(sd15_copy / "unet" / WEIGHTS, lambda tensors: tensors | {"conv_in.weight": torch.ones(8, 9, 3, 3)})
    assert "the UNet maps 9 channels to 4, the latents have 4; only text-to-image" in refusal(load, sd15_copy)


def test_a_unet_for_another_text_encoder_is_refused(sd15_copy, sdxl):
    for part in "unet", "vae":
        shutil.rmtree(sd15_copy / part)
        shutil.copytree(sdxl / part, sd15_copy / part)
    assert "the UNet expects text of width 80, not 32" in refusal(load, sd15_copy)


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction' is not supported, only 'epsilon'"),
        ({"prediction_type": "diff_eps"}, "prediction_type = 'diff_eps' is not supported, only 'epsilon'"),
        ({"_class_name": "PeRFlowScheduler"}, "prediction_type = 'epsilon' is not supported, only 'ddim_eps'"),
        ({"beta_schedule": "linear"}, "beta_schedule = 'linear' is not supported, only 'scaled_linear'"),
        ({"num_train_timesteps": 100}, "num_train_timesteps = 100 is not supported, only 1000"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True is not supported, only False"),
    ],
)
def test_another_noise_schedule_is_refused(sd15_copy, settings, complaint):
    edit(sd15_copy / "scheduler/scheduler_config.json", **settings)
    assert f"scheduler {complaint}" in refusal(load, sd15_copy)


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_broken_tokenizer_is_refused(sd15, tokenizer, tmp_path, file, content):
    folder = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    (folder / file).write_text(content)
    if content == '{"a": 1}' and file != "vocab.json":
        load(sd15, tokenizer=folder)  # a setting that changes nothing
    else:
        assert str(folder) in refusal(load, sd15, tokenizer=folder)


def test_a_tokenizer_of_another_vocabulary_is_refused(sd15, tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    write(folder / "vocab.json", read(folder / "vocab.json") | {"dog</w>": 523})
    assert "the tokenizer knows 524 tokens, the text_encoder 523" in refusal(load, sd15, tokenizer=folder)


@pytest.mark.parametrize("size, parts", [(8, [5]), (32, [4, 1]), (40, [2, 2, 1]), (72, [1] * 5)])
def test_images_are_decoded_a_few_at_a_time(size, parts):
    sd, seen = load(MINIATURE), []
    decode = sd.vae.decode
    sd.vae.decode = lambda z: seen.append(len(z)) or z.repeat(1, 1, 8, 8)[:, :3]
    latents = draw(5, 4, size, size)
    assert sd.decode(latents).shape == (5, 3, 8 * size, 8 * size) and seen == parts
    sd.vae.decode = decode
    if size == 32:
        alone = torch.cat([sd.decode(one[None]) for one in latents])
        torch.testing.assert_close(sd.decode(latents), alone, rtol=0, atol=1e-4)


def test_loading_a_model_does_not_import_the_compiler():
    """It would be a third of the time from a program's start to its first image."""
    code = "import sys, sample; sample.StableDiffusion.load(MINIATURE); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=MINIATURE.parents[1], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
