"""What is not in the paper: guided trajectories, and samples that start on the student's own trajectory."""

import numpy as np
import torch
from helpers import randomize
from test_train import CPU, compare_with_hand, draw, settings

import data
import reflow
import sample
from model import StableDiffusion
from paper import variants
from support.official import flow_scheduler


def test_the_loss_on_guided_trajectories_is_that_worked_out_by_hand(sdxl):
    args = settings(own_starts=0, teacher_guidance=3)
    compare_with_hand(sdxl, {}, args, variants.trajectory, guidance=3)


@torch.no_grad()
def test_a_share_of_samples_starts_where_the_average_leads(sd15):
    teacher, ema = StableDiffusion.load(sd15), randomize(StableDiffusion.load(sd15).unet, 9)
    batch = data.prepare(teacher, draw(6, windows=4), CPU)
    args = settings(windows=4, own_starts=0.5, teacher_guidance=1)
    grid, z_s, _ = variants.trajectory(teacher, ema, batch, args)
    expected = reflow.add_noise(batch["z_0"], batch["noise"], reflow.alpha_bar(teacher.alphas_cumprod, grid[0]))
    for i in range(3):
        conditions = tuple(None if c is None else c[i : i + 1] for c in batch["conditions"])
        velocity = reflow.as_velocity(teacher.epsilon(conditions, unet=ema), teacher.alphas_cumprod, 4)
        above = [at for at in reflow.boundaries(4) if at >= grid[0, i]]
        expected[i] = reflow.euler(velocity, batch["noise"][i : i + 1], torch.tensor(above))[0]
    assert len(set(grid[0, :3].tolist())) > 1
    torch.testing.assert_close(z_s, expected, rtol=1e-4, atol=1e-4)


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
    assert variants.nfe_of_sample(2, guidance=3, own_starts=0.5, windows=4) == 2 * 2 + 1.5 + 3
