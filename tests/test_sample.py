"""From prompts to images: the same as diffusers' pipelines, and what the command line promises."""

import subprocess

import diffusers
import helpers
import numpy as np
import pytest
import torch
from helpers import ONE_THREAD, edit, exit_code, refusal, rewrite
from PIL import Image

import reflow
import sample
from model import StableDiffusion
from support.streams import draw_noise


def run(*arguments):
    return exit_code(sample, *arguments)


TRAILING = {"timestep_spacing": "trailing"}
SECOND_ORDER = TRAILING | {"final_sigmas_type": "sigma_min", "solver_order": 2}
PIPELINES = {
    "SD1.5": ("sd15", "ddim", diffusers.DDIMScheduler, TRAILING, "the cat"),
    "SDXL": ("sdxl", "ddim", diffusers.DDIMScheduler, TRAILING, None),
    "DPM++": ("sd15", "dpm++", diffusers.DPMSolverMultistepScheduler, SECOND_ORDER, None),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_whole_run_gives_the_images_of_diffusers(request, kind):
    """Text to image with guidance in 8 steps: 8 divides 1000, so that both walk the same grid of timesteps."""
    model, sampler, scheduler, settings, negative_prompt = PIPELINES[kind]
    pipeline, sd = request.getfixturevalue(f"{model}_pipeline"), StableDiffusion.load(request.getfixturevalue(model))
    noise, scheduler = draw_noise(3, [0, 1], (4, 8, 8)), scheduler.from_config(pipeline.scheduler.config, **settings)
    theirs = pipeline.__class__(**pipeline.components | {"scheduler": scheduler})
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a red cat", "the cat in the red"]
    expected = theirs(
        prompts, negative_prompt=[negative_prompt] * 2 if negative_prompt else None, num_inference_steps=8,
        guidance_scale=3.0, latents=noise, output_type="np", height=64, width=64,
    ).images  # fmt: skip
    images = sample.generate(sd, prompts, 8, 3.0, negative_prompt=negative_prompt or "", sampler=sampler, latents=noise)
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8 and images.std() > 5
    assert np.abs(images / 255 - expected).max() < 1.5 / 255  # at most one level, from rounding


@pytest.mark.slow
def test_a_compiled_network_is_one_graph_and_compiled_once_for_all_steps(sdxl):
    sd = StableDiffusion.load(sdxl)
    expected, graphs = sample.generate(sd, ["the cat"], 5, size=64), []
    sd.unet.compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for steps in 3, 5:
        images = sample.generate(sd, ["the cat"], steps, size=64)
    assert (images == expected).all() and len(graphs) == 1


def test_an_image_depends_on_seed_and_number_alone(sd15):
    sd = StableDiffusion.load(sd15)
    prompts = ["a red cat", "the cat", "a cat"]
    together = sample.generate(sd, prompts, 3, 2.0, seed=5)
    for i in (2, 0):
        alone = sample.generate(sd, prompts[i : i + 1], 3, 2.0, seed=5, indices=[i])
        assert np.abs(alone[0].astype(int) - together[i]).max() <= 1  # batched arithmetic may round otherwise
    assert np.abs(sample.generate(sd, ["a cat"], 3, 2.0, seed=6, indices=[2])[0].astype(int) - together[2]).max() > 10


@pytest.mark.parametrize("perflow", [False, True], ids=["flow trained here", "PeRFlow's"])
def test_a_flow_in_one_step_a_window_is_ddim_between_boundaries(sd15_copy, perflow):
    """Networks are asked at tau - 1, PeRFlow's at tau."""
    diffusion = StableDiffusion.load(sd15_copy)
    settings = {"_class_name": "PeRFlowScheduler", "prediction_type": "ddim_eps"} if perflow else {}
    edit(sd15_copy / "scheduler/scheduler_config.json", num_time_windows=4, **settings)
    flow, noise = StableDiffusion.load(sd15_copy), draw_noise(0, [0], (4, 8, 8))
    with torch.no_grad():
        epsilon = diffusion.epsilon(diffusion.conditions(["the cat"], 64, 64), 2.0, diffusion.conditions([""], 64, 64))
        grid = torch.tensor(reflow.boundaries(4))
        z = reflow.ddim(lambda z, tau: epsilon(z, tau + perflow), noise, flow.alphas_cumprod, grid)
        expected = diffusion.decode(z)
    image = sample.generate(flow, ["the cat"], 4, 2.0, latents=noise)
    assert np.abs(image[0] - (expected[0].permute(1, 2, 0).numpy() + 1) * 127.5).max() < 1.01
    message = refusal(sample.generate, flow, ["a cat"], 3)
    assert message == "--steps must be from 4 to 1000 (the model has 4 windows), not 3"
    assert "use flow" in refusal(sample.generate, flow, ["a cat"], 4, sampler="ddim")


def test_the_command_writes_images_that_know_how_they_were_made(sd15, tmp_path):
    settings = ["--n", 2, "--steps", 2, "--seed", 7, "--guidance", 2.5, "--negative-prompt", "日本"]
    assert run("--model", sd15, "--prompt", "a cat", "the red", *settings, "--out", tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"{i:05d}.png" for i in range(4)), "sheet.png"]
    with Image.open(tmp_path / "00002.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
        assert len(image.text.pop("weights")) == 12
        assert image.text == {
            "prompt": "the red", "index": "2", "negative_prompt": "日本", "seed": "7", "steps": "2", "guidance": "2.5",
            "sampler": "ddim", "size": "64", "dtype": "float32", "model": "sd15", "software": "proreflow",
        }  # fmt: skip


def test_a_repeated_run_makes_only_what_is_missing_or_was_made_otherwise(sd15_copy, tmp_path, monkeypatch):
    arguments = ["--model", sd15_copy, "--prompt", "a cat", "a red cat", "--steps", 1, "--out", tmp_path / "out"]
    generate, made = sample.generate, []
    monkeypatch.setattr(sample, "generate", lambda *a, **kw: made.append(kw["indices"]) or generate(*a, **kw))

    def run_again(*more):
        made.clear()
        assert run(*arguments, *more) == 0
        return made

    assert run_again() == [[0, 1]] and run_again() == []
    image = tmp_path / "out/00001.png"
    image.unlink()
    assert run_again() == [[1]]
    image.write_bytes(image.read_bytes()[:60])  # cut short
    assert run_again() == [[1]]
    assert run_again("--seed", 1) == [[0, 1]]
    # a weight file as long as before, such as with a merged LoRA
    file = sd15_copy / "unet/diffusion_pytorch_model.safetensors"
    rewrite(file, lambda weights: {k: -w if "attn2.to_q" in k else w for k, w in weights.items()})
    assert run_again() == [[0, 1]]
    edit(sd15_copy / "vae/config.json", scaling_factor=0.5)
    assert run_again() == [[0, 1]] and run_again() == []


def test_what_has_no_effect_or_another_one_is_a_notice(sd15, tmp_path, capsys):
    (tmp_path / "00007.png").write_bytes(b"of another run")
    arguments = ["--model", sd15, "--prompt", "the cat, a zebra", "--steps", 1, "--out", tmp_path]
    assert run(*arguments, "--guidance", 1, "--negative-prompt", "red") == 0
    notices = capsys.readouterr().err
    assert "notice: words that this model never learned: zebra\n" in notices
    assert "notice: --negative-prompt has no effect without guidance (--guidance 1)\n" in notices
    assert "also holds 1 images that are not of this run" in notices
    assert run(*arguments, "--guidance", 0) == 0
    assert "notice: --guidance 0 ignores the prompt; 1 is no guidance\n" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_the_images_of_one(sd15, tmp_path):
    arguments = ["--model", sd15, "--prompt", "a cat", "a red cat", "the cat", "--steps", 2, "--guidance", 2]
    assert run(*arguments, "--out", tmp_path / "one") == 0
    command = helpers.command(sample, *arguments, "--out", tmp_path / "two", processes=2)
    subprocess.run(command, check=True, env=ONE_THREAD)
    for name in "00000.png", "00001.png", "00002.png", "sheet.png":
        images = [np.array(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two")]
        assert np.abs(images[0] - images[1]).max() <= 1


def test_other_sizes_and_dtypes_work(sd15):
    sd = StableDiffusion.load(sd15, dtype=torch.bfloat16)
    assert sample.generate(sd, ["a cat"], 2, 2.0, size=104).shape == (1, 104, 104, 3)


@pytest.mark.slow
@pytest.mark.parametrize("folder, sampler", [("sdxl", "ddim"), ("sd15", "dpm++"), ("sd15", "flow")])
def test_nothing_is_read_back_from_the_device_until_images_are_decoded(request, monkeypatch, folder, sampler):
    flow = {"_class_name": "PeRFlowScheduler", "num_time_windows": 2} if sampler == "flow" else {}
    sd = helpers.shapes_only(request.getfixturevalue(folder), **flow)
    monkeypatch.setattr(sd, "decode", lambda latents: latents)
    monkeypatch.setattr(sample, "to_pixels", lambda latents: latents)
    latents = sample.generate(sd, ["a cat", "the cat"], 3, 4.0, sampler=sampler)
    assert (latents.device.type, latents.shape) == ("meta", (2, 4, 8, 8))  # where nothing can be read


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "100"], "--size 100 does not fit: it must be a multiple of 8 pixels"),
        (["--sampler", "flow"], "--sampler flow does not fit: the model is a diffusion model; use ddim or dpm++"),
        (["--steps", "0"], "--steps: must be"),
        (["--n", "0"], "--n: must be"),
        (["--model", "nowhere"], "nowhere"),
        (["--seed", "-1"], "--seed: must be"),
        (["--guidance", "nan"], "--guidance: must be"),
        (["--batch-size", "0"], "--batch-size: must be"),
    ],
)
def test_a_wrong_argument_is_one_clear_line_and_exit_code_2(sd15, tmp_path, capsys, arguments, message):
    model = [] if "--model" in arguments else ["--model", sd15]
    assert run("--prompt", "a cat", "--out", tmp_path, *model, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # above it, a progress bar may stand
    assert error.startswith("error: ") and message in error


def test_a_folder_where_an_image_should_be_is_refused_before_the_work(sd15, tmp_path, capsys):
    (tmp_path / "00000.png").mkdir()
    assert run("--model", sd15, "--prompt", "a cat", "--steps", 1, "--out", tmp_path) == 2
    assert "00000.png is a folder" in capsys.readouterr().err
