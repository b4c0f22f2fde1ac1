"""Which process this is among those that torchrun started, what they tell each other, and which device it uses."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from support.errors import InputError


def rank_and_world() -> tuple[int, int]:
    """(rank, number) of this process among those that `torchrun` started; (0, 1) without it."""
    started = {"RANK", "MASTER_ADDR"} & os.environ.keys()
    if started == {"RANK"} or (not started and int(os.environ.get("SLURM_NTASKS", 1)) > 1):
        raise InputError("RANK or SLURM_NTASKS tells of several processes; start them with torchrun, or unset both")
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(device: str | None) -> str:
    """The requested device, if it can be used; "cuda" is this process's GPU. By default the GPU, where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]  # some go on for pages
        raise InputError(f"--device {device} cannot be used here ({reason}); cpu always can") from None
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
        if world > 1:  # at first, so that no process waits for one whose device cannot be used
            backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backends, timeout=timedelta(hours=2))  # longer than any checkpoint takes
        process = cls(rank, world, torch.device(choose_device(device)))
        if process.device.type == "cuda":
            torch.cuda.set_device(process.device)
        return process

    def gather(self, mine: object) -> list:
        """What each process has to say, by rank. No GPU is waited for."""
        everyone = [mine] * self.world
        try:
            if self.world > 1:
                dist.all_gather_object(everyone, mine)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"another process has ended, see its message ({reason})") from None
        return everyone

    def sharded(self, optimizer: type[Optimizer]) -> Callable[..., Optimizer]:
        """Its constructor; with several processes, each holds the state of a share of the weights (ZeRO, stage 1)."""
        if self.world == 1:
            return optimizer
        from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import, with a warning

        return partial(ZeroRedundancyOptimizer, optimizer_class=optimizer)

    def end(self) -> None:
        """Wait for all to come here."""
        if self.world > 1:
            self.gather(None)
            dist.destroy_process_group()
