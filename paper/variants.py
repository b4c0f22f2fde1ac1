"""The trainer with what is not in the paper: guided trajectories, reused ones, other times, PeRFlow's published loss.

    torchrun --module paper.variants --stage 1 --teacher-guidance 3

Guided trajectories (Meng et al. 2023, "On distillation of guided diffusion models"): the teacher's steps hold guidance,
so the flow is sampled without, at half the NFE. PeRFlow trains its SDXL so, and Rectified Diffusion its phased
flows. Read `train.py` first: all else is as there.
"""

import argparse
from collections import deque
from pathlib import Path

import torch
from torch import Tensor, nn

import reflow
import train
from loss import decomposed_velocity_loss
from model import StableDiffusion
from support.devices import rank_and_world
from support.errors import at_least_0, count, positive_int, share
from support.memory import teacher_nfe
from support.streams import REUSE, stream


def trajectory(teacher: StableDiffusion, batch: dict, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's guided solution of each sample's window: (grid, z_s, z_e)."""
    height, width = (n * teacher.downscale for n in batch["noise"].shape[2:])
    uncond = teacher.conditions([""], height, width) if args.teacher_guidance != 1 else None
    epsilon = teacher.epsilon(batch["conditions"], args.teacher_guidance, uncond)
    return train.teacher_trajectory(teacher, batch, args, epsilon)


class Pool:
    """The trajectories of the last updates, each trained on about --reuse times, at other times of its window.

    Rectified Flow trains for epochs on stored pairs. Here they are made on the way: of a batch, only one sample in
    --reuse is solved, and the student learns from a batch that is drawn from the pool. A resumed run fills it anew, so
    its weights are not those of a run without interruption.
    """

    BATCHES = 16  # of trajectories that are held

    def __init__(self, args: argparse.Namespace):
        self.random = stream(REUSE, args.seed, rank_and_world()[0])
        self.parts = deque(maxlen=self.BATCHES * args.reuse)

    def trajectory(
        self, teacher: StableDiffusion, batch: dict, args: argparse.Namespace
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(grid, z_s, z_e) of drawn trajectories, whose conditions and new times replace those of the batch."""
        start, end = reflow.window_of(batch["tau"], args.windows)
        place = (start - batch["tau"]) / (start - end)  # 0 at the start of its window
        few = slice(-(-len(place) // args.reuse))
        solved = {name: x[few] for name, x in batch.items() if torch.is_tensor(x)}
        solved["conditions"] = tuple(x if x is None else x[few] for x in batch["conditions"])
        grid, z_s, z_e = trajectory(teacher, solved, args)
        self.parts.append((grid[0], grid[-1], z_s, z_e, *solved["conditions"]))
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*self.parts)]
        drawn = torch.from_numpy(self.random.integers(len(columns[0]), size=len(place))).to(place.device)
        start, end, z_s, z_e, *conditions = (x if x is None else x[drawn] for x in columns)
        batch |= {"tau": start - (place * (start - end)).round().long(), "conditions": tuple(conditions)}
        return torch.stack([start, end]), z_s, z_e


def epsilon_loss(
    student: nn.Module, teacher: StableDiffusion, batch: dict, trajectory: tuple, windows: int, alpha: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PeRFlow's published loss (`noise_matching`): the error of the noise that leads from z_s to z_e in one step."""
    grid, z_s, z_e = trajectory
    a_s, a_e = (reflow.alpha_bar(teacher.alphas_cumprod, tau) for tau in (grid[0], grid[-1]))
    lam, eta = reflow.ddim_coefficients(a_s, a_e, teacher.prediction_type)
    wanted = (z_e - reflow.append_dims(lam, z_s) * z_s) / reflow.append_dims(eta, z_s)
    z_t, _ = reflow.straight_line(grid[0], grid[-1], z_s, z_e, batch["tau"])
    epsilon = teacher.epsilon(batch["conditions"], unet=student)
    return decomposed_velocity_loss(epsilon(z_t, batch["tau"]), wanted, alpha)


def nfe_of_sample(steps: int, guidance: float = 1.0) -> int:
    """Training cost of a sample in network evaluations: the teacher's, and three for the student's forward and backward
    pass, since a backward pass takes as long as two forward passes."""
    return teacher_nfe(steps, guidance) + 3


def run(args: argparse.Namespace) -> None:
    learned = Pool(args).trajectory if args.reuse > 1 else trajectory
    train.run(args, learned, epsilon_loss if args.epsilon_loss else train.compute_loss)


def main() -> None:
    parser = train.arguments()
    parser.description = __doc__
    ours = parser.add_argument_group("not in the paper, either")
    ours.add_argument("--name", help="name of the result in --out; default: stage-K or windows-K")
    ours.add_argument("--windows", type=positive_int, help="a stage of this number of windows; needs --teacher")
    ours.add_argument("--student", type=Path, help="the student starts from this model's weights, not the teacher's")
    ours.add_argument("--teacher-guidance", type=at_least_0, help="of the trajectories; default: 1, none, the paper's")
    ours.add_argument("--reuse", type=positive_int, help="uses of each trajectory, on average; default: 1, the paper's")
    ours.add_argument("--epsilon-loss", action="store_true", help="PeRFlow's published loss; its --alpha is 0")
    ours.add_argument("--starts", type=share, help="share of times at their window's start; 0: even times, the paper's")
    ours.add_argument("--gap", type=share, help="share of every window, at its end, without times; default: by model")
    ours.add_argument("--solver-steps", type=positive_int, help="teacher's steps per window; default: its share of 32")
    ours.add_argument("--warmup", type=count, help="updates until the learning rate is reached; default: by model")
    ours.add_argument("--cooldown", type=share, help="share of updates, at the end, in which it falls to zero")
    ours.add_argument("--ema", type=share, help="decay of the moving average of the weights; default: by model")
    ours.add_argument("--augment", action="store_true", help="crop images at random places, mirror half of them")
    train.main(parser, run)


if __name__ == "__main__":
    main()
