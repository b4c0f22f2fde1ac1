"""The trainer with what is not in the paper: guided trajectories, starts on the student's own trajectory, other times.

    torchrun --module paper.variants --stage 1 --teacher-guidance 3

Guided trajectories (Meng et al. 2023, "On distillation of guided diffusion models"): the teacher's steps hold guidance,
so the flow is sampled without, at half the evaluations. PeRFlow trains its SDXL so, and Rectified Diffusion its phased
flows. Own starts: noised images are where sampling meets a window only if trajectories lead to such images. Those with
guidance do not, nor do those with the student's errors so far. So a share of samples starts where the student's own
trajectory from noise leads, and the teacher's solution from there corrects it (as in DMD2, Yin et al. 2024, 4.5;
FlowSteer, arXiv 2511.18834, starts on the teacher's). Read `train.py` first: all else is as there.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import reflow
import train
from model import StableDiffusion
from support.errors import at_least_0, count, positive_int, share
from support.memory import teacher_nfe
from unet import UNet


def trajectory(
    teacher: StableDiffusion, ema: UNet, batch: dict, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's guided solution of each sample's window: (grid, z_s, z_e)."""
    grid = reflow.solver_grid(batch["tau"], args.windows, args.solver_steps)
    z_s = reflow.add_noise(batch["z_0"], batch["noise"], reflow.alpha_bar(teacher.alphas_cumprod, grid[0]))
    if own := round(args.own_starts * len(z_s)):
        z_s = torch.cat([start_on_trajectory(teacher, ema, batch, grid[0], own, args.windows), z_s[own:]])
    height, width = (n * teacher.downscale for n in z_s.shape[2:])
    uncond = teacher.conditions([""], height, width) if args.teacher_guidance != 1 else None
    epsilon = teacher.epsilon(batch["conditions"], args.teacher_guidance, uncond)
    return grid, z_s, train.solve(teacher, epsilon, z_s, grid)


def start_on_trajectory(
    teacher: StableDiffusion, ema: UNet, batch: dict, starts: Tensor, count: int, windows: int
) -> Tensor:
    """For the first `count` samples: where the student's trajectory from noise is at `starts`. windows - 1 NFE."""
    conditions = tuple(None if c is None else c[:count] for c in batch["conditions"])
    epsilon = teacher.epsilon(conditions, unet=ema)
    velocity = reflow.as_velocity(epsilon, teacher.alphas_cumprod, windows, teacher.prediction_type)
    falling = reflow.rising_boundaries(windows, starts.device)[1:].flip(0)
    # Once a sample is at its start, its steps have no length.
    return reflow.euler(velocity, batch["noise"][:count], falling[:, None].clamp(min=starts[:count]))


def nfe_of_sample(steps: int, guidance: float = 1.0, own_starts: float = 0.0, windows: int = 1) -> float:
    """Training cost of a sample in network evaluations: the teacher's, and three for the student's forward and backward
    pass, since a backward pass takes as long as two forward passes."""
    return teacher_nfe(steps, guidance, own_starts, windows) + 3


def main() -> None:
    parser = train.arguments()
    parser.description = __doc__
    ours = parser.add_argument_group("not in the paper, either")
    ours.add_argument("--name", help="name of the result in --out; default: stage-K or windows-K")
    ours.add_argument("--windows", type=positive_int, help="a stage of this number of windows; needs --teacher")
    ours.add_argument("--student", type=Path, help="the student starts from this model's weights, not the teacher's")
    ours.add_argument("--teacher-guidance", type=at_least_0, help="of the trajectories; default: 1, none, the paper's")
    ours.add_argument("--own-starts", type=share, help="share of samples on the student's trajectory; default: 0")
    ours.add_argument("--starts", type=share, help="share of times at their window's start; 0: even times, the paper's")
    ours.add_argument("--gap", type=share, help="share of every window, at its end, without times; default: by model")
    ours.add_argument("--solver-steps", type=positive_int, help="teacher's steps per window; default: its share of 32")
    ours.add_argument("--warmup", type=count, help="updates until the learning rate is reached; default: by model")
    ours.add_argument("--cooldown", type=share, help="share of updates, at the end, in which it falls to zero")
    ours.add_argument("--ema", type=share, help="decay of the moving average of the weights; default: by model")
    ours.add_argument("--augment", action="store_true", help="crop images at random places, mirror half of them")
    train.main(parser, lambda args: train.run(args, trajectory))


if __name__ == "__main__":
    main()
