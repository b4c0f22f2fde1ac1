"""What train.py writes gives the same images in diffusers."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from model import MINIATURE, StableDiffusion, flow_scheduler, save_flow
from support.streams import draw_noise

file = Path(train.__file__).parent / "docs/in_diffusers.py"
spec = importlib.util.spec_from_file_location("in_diffusers", file)
in_diffusers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(in_diffusers)


@pytest.mark.parametrize("steps", [4, 6])
def test_a_flow_in_a_diffusers_pipeline_draws_what_sample_py_draws(tmp_path, steps):
    base = StableDiffusion.load(MINIATURE)
    save_flow(base.unet, flow_scheduler(base, 4), MINIATURE, tmp_path / "flow", torch.float32)
    prompts = ["a red circle", "a small blue ring"]
    ours = sample.generate(StableDiffusion.load(tmp_path / "flow"), prompts, steps, 3.0, seed=5)
    pipeline = in_diffusers.load(str(tmp_path / "flow"))
    pipeline.set_progress_bar_config(disable=True)
    latents = draw_noise(5, [0, 1], (4, 8, 8))
    theirs = pipeline(prompts, num_inference_steps=steps, guidance_scale=3.0, latents=latents, output_type="np").images
    assert np.abs(ours / 255 - theirs).max() < 1.01 / 255
