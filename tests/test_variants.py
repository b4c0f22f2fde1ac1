"""What is not in the paper: guided trajectories, trajectories from noise, another loss."""

import numpy as np
import pytest
import torch
from helpers import randomize, refusal
from test_train import CPU, compare_with_hand, draw, settings

import data
import reflow
import sample
from model import StableDiffusion
from paper import variants
from support.official import flow_scheduler


def test_the_loss_on_guided_trajectories_is_that_worked_out_by_hand(sdxl):
    args = settings(from_noise=False, teacher_guidance=3)
    compare_with_hand(sdxl, {}, args, variants.trajectory, guidance=3)


@torch.no_grad()
@pytest.mark.parametrize("windows", [2, 3])
def test_trajectories_from_noise_give_a_sample_to_each_window(sd15, windows):
    teacher, items = StableDiffusion.load(sd15), draw(7, windows)
    batch = data.prepare(teacher, items, CPU)
    args = settings(windows=windows, solver_steps=2, teacher_guidance=3, from_noise=True)
    grid, z_s, z_e = variants.trajectory(teacher, batch, args)
    number, edges = 7 // windows, reflow.boundaries(windows)
    assert len(z_s) == number * windows
    for i in range(number):
        caption = "" if items["uncond"][i] else items["caption"][i]
        conditions, uncond = (teacher.conditions([text], 64, 64) for text in (caption, ""))
        epsilon, z = teacher.epsilon(conditions, 3, uncond), batch["noise"][i : i + 1]
        for k in range(windows):
            at = i + k * number  # its place in the batch
            torch.testing.assert_close(z_s[at : at + 1], z, rtol=1e-4, atol=1e-4)
            z = reflow.ddim(epsilon, z, teacher.alphas_cumprod, grid[:, at])
            torch.testing.assert_close(z_e[at : at + 1], z, rtol=1e-4, atol=1e-4)
            assert (grid[0, at], grid[-1, at]) == (edges[k], edges[k + 1])
            assert edges[k] >= batch["tau"][at] > edges[k + 1]
            torch.testing.assert_close(batch["conditions"][0][at], conditions[0][0])
    args.windows = 8
    assert "give at least this --batch-size" in refusal(variants.trajectory, teacher, batch, args)


@torch.no_grad()
def test_moved_times_keep_their_place_in_the_window(sd15):
    teacher, items = StableDiffusion.load(sd15), draw(8, 4)
    batch = data.prepare(teacher, items, CPU)
    variants.trajectory(teacher, batch, settings(windows=4, solver_steps=1, teacher_guidance=1, from_noise=True))
    assert torch.equal(batch["tau"] % 250, items["tau"] % 250) and not torch.equal(batch["tau"], items["tau"])


@torch.no_grad()
def test_the_epsilon_loss_is_the_error_of_the_noise_of_one_step(sd15):
    """Of a teacher with one step a window, that is the teacher's own noise."""
    teacher, student = StableDiffusion.load(sd15), randomize(StableDiffusion.load(sd15).unet, 9)
    batch = data.prepare(teacher, draw(4, 4), CPU)
    batch["tau"], _ = reflow.window_of(batch["tau"], 4)
    args = settings(windows=4, solver_steps=1, teacher_guidance=1, from_noise=False)
    path = variants.trajectory(teacher, batch, args)
    noise, other = (teacher.epsilon(batch["conditions"], unet=unet)(path[1], batch["tau"]) for unet in (None, student))
    for unet, expected in (teacher.unet, 0.0), (student, (other - noise).square().mean().item()):
        loss, _ = variants.epsilon_loss(unet, teacher, batch, path, 4, 0.0)
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_flow_of_guided_trajectories_says_so_and_passes_it_on(sd15):
    diffusion, flow = StableDiffusion.load(sd15), StableDiffusion.load(sd15)
    flow.configs["scheduler"] = flow_scheduler(diffusion, 8, guidance=2.5)
    assert flow.configs["scheduler"]["trained_guidance"] == 2.5 and (diffusion.guidance, flow.guidance) == (4, 1)
    merged = flow_scheduler(flow, 4)
    assert (merged["num_time_windows"], merged["trained_guidance"]) == (4, 2.5)
    images, unguided = (sample.generate(flow, ["a red cat"], 8, guidance_scale=scale) for scale in (None, 1))
    assert np.array_equal(images, unguided)


def test_the_cost_of_a_sample_counts_evaluations():
    assert variants.nfe_of_sample(4) == 4 + 3
    assert variants.nfe_of_sample(2, guidance=3) == 2 * 2 + 3
