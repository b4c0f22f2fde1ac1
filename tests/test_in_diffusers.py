"""What train.py writes gives the same images in diffusers."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import sample
from model import FLOW, StableDiffusion, save_flow
from support.official import flow_scheduler
from support.streams import draw_noise
from tools import in_diffusers

PROMPTS = ["the red cat", "a cat on the cat"]


def images(pipeline, steps, guidance_scale, prompts=PROMPTS):
    pipeline.set_progress_bar_config(disable=True)
    latents = draw_noise(5, [0, 1], (4, 8, 8))
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": 64, "width": 64}
    return pipeline(prompts, latents=latents, output_type="np", **options).images


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request):
    return StableDiffusion.load(request.getfixturevalue(request.param))


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_diffusers_draws_a_flow_as_sample_py_does(base, tmp_path, stored):
    """However it is stored: plain diffusers in a step a window, without any arguments; our scheduler in more steps."""
    save_flow(base.unet, flow_scheduler(base, 4), base, tmp_path / "flow", stored)
    if stored == torch.float16:  # all of it, as it is published
        half = StableDiffusion.load(tmp_path / "flow", dtype=None)
        for network in half.networks.values():
            network.half()
        half.save(tmp_path / "flow")
    plain, ours = DiffusionPipeline.from_pretrained(tmp_path / "flow"), StableDiffusion.load(tmp_path / "flow")
    for windows in (1, 2, 4) if stored == torch.float32 else (4,):
        ours.configs["scheduler"]["num_time_windows"] = windows
        for guidance_scale in 1.0, 4.0:
            wanted = sample.generate(ours, PROMPTS, windows, guidance_scale, seed=5)
            assert np.abs(wanted / 255 - images(plain, windows, guidance_scale)).max() < 1.01 / 255
    wanted = sample.generate(ours, PROMPTS, 6, 3.0, seed=5)
    assert np.abs(wanted / 255 - images(in_diffusers.load(str(tmp_path / "flow")), 6, 3.0)).max() < 1.01 / 255


@pytest.mark.slow
def test_plain_diffusers_draws_the_shipped_flow():
    pipeline, prompts = DiffusionPipeline.from_pretrained(FLOW), ["a red circle", "a small blue ring"]
    wanted = sample.generate(StableDiffusion.load(FLOW), prompts, 4, 4.0, seed=5)
    assert np.abs(wanted / 255 - images(pipeline, 4, 4.0, prompts)).max() < 1.01 / 255
