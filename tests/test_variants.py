"""What is not in the paper: guided trajectories and another loss."""

import numpy as np
import pytest
import torch
from helpers import randomize
from test_train import CPU, compare_with_hand, draw, settings

import data
import reflow
import sample
from model import StableDiffusion
from paper import variants
from support import datasets
from support.official import flow_scheduler


def test_the_loss_on_guided_trajectories_is_that_worked_out_by_hand(sdxl):
    args = settings(teacher_guidance=3)
    compare_with_hand(sdxl, {}, args, variants.trajectory, guidance=3)


@torch.no_grad()
def test_the_epsilon_loss_is_the_error_of_the_noise_of_one_step(sd15):
    """Of a teacher with one step a window, that is the teacher's own noise."""
    teacher, student = StableDiffusion.load(sd15), randomize(StableDiffusion.load(sd15).unet, 9)
    batch = data.prepare(teacher, draw(4, 4), CPU)
    batch["tau"], _ = reflow.window_of(batch["tau"], 4)
    args = settings(windows=4, solver_steps=1, teacher_guidance=1)
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


@torch.no_grad()
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_trajectories_of_the_pool_are_solved_once_and_trained_on_at_new_times(request, model):
    """What is drawn is a trajectory of this or an earlier update, with its own conditions and a time in its window."""
    teacher = StableDiffusion.load(request.getfixturevalue(model))
    samples = data.Samples(datasets.Scenes(0), 0, (4, 8, 8), 8, starts=0.5)
    args = settings(teacher_guidance=3, seed=0, reuse=4)
    pool, solved, times = variants.Pool(args), {}, []
    for items in data.batches(samples, 0, 3, 8, 0, 1, 0):
        batch = data.prepare(teacher, items, CPU)
        first = {name: x[:2] for name, x in batch.items() if torch.is_tensor(x)}
        first["conditions"] = tuple(x if x is None else x[:2] for x in batch["conditions"])
        at_start = (batch["tau"] == reflow.window_of(batch["tau"], 8)[0]).clone()
        grid, z_s, z_e = variants.trajectory(teacher, first, args)
        solved |= {z_s[i].sum().item(): (grid[[0, -1], i], z_e[i], first["conditions"][0][i]) for i in range(2)}

        grid, z_s, z_e = pool.trajectory(teacher, batch, args)
        for i in range(8):
            ends, z, context = solved[z_s[i].sum().item()]
            assert torch.equal(grid[:, i], ends) and torch.equal(batch["conditions"][0][i], context)
            assert torch.allclose(z_e[i], z, atol=1e-5)
            assert ends[1] < batch["tau"][i] <= ends[0] and (batch["tau"][i] == ends[0]) == at_start[i]
        times += zip(z_s.sum((1, 2, 3)).tolist(), batch["tau"].tolist())
    drawn = [which for which, _ in times]
    assert len(solved) == 6 and set(drawn) == set(solved) and len(set(times)) > 6  # some at several times
    assert len(pool.parts) == 3 and pool.parts.maxlen == 16 * 4
