"""Which process this is among those that torchrun started, and which device it uses."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from support.errors import InputError


def rank_and_world() -> tuple[int, int]:
    """(rank, number) of this process among those that `torchrun` started; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(device: str | None) -> str:
    """The requested device, if it can be used; else this process's GPU, or the CPU where there is none."""
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device} cannot be used here ({reason}); cpu always can") from None
    return device


@dataclass
class Process:
    """This process among those that `torchrun` started; alone without it."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None) -> "Process":
        rank, world = rank_and_world()
        device = torch.device(choose_device(device))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, world, device)

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.world == 1:
            return numbers
        total = numbers.clone()
        dist.all_reduce(total)
        return total / self.world

    def end(self) -> None:
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
