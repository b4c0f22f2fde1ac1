"""A trained flow in diffusers, in any number of steps. Needs requirements-dev.txt.

    python -m tools.in_diffusers out/train/stage-2 "a red circle"

In one step a window, plain diffusers draws the same images, without this file: StableDiffusionPipeline.from_pretrained.
"""

import sys

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import reflow


class FlowScheduler(DDIMScheduler):
    """Windowed Euler steps, for a pipeline whose folder was written by train.py."""

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        self.grid = reflow.sampling_grid(num_inference_steps, self.config.num_time_windows)
        self.shift = 1 if self.config.prediction_type == "epsilon" else 0  # networks' own index, see reflow.py
        self.num_inference_steps, self.timesteps = num_inference_steps, (self.grid[:-1] - self.shift).to(device)

    def step(self, eps: torch.Tensor, t: torch.Tensor, z: torch.Tensor, return_dict: bool = True, **_):
        at = (self.grid == t.item() + self.shift).nonzero().item()
        settings = self.alphas_cumprod.to(z.device), self.config.num_time_windows, self.config.prediction_type
        velocity = reflow.as_velocity(lambda *_: eps, *settings)
        return (reflow.euler(velocity, z, self.grid[at : at + 2].to(z.device)),)


def load(folder: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = FlowScheduler.from_config(pipeline.scheduler.config)
    return pipeline


if __name__ == "__main__":
    pipe = load(sys.argv[1])
    pipe(sys.argv[2], num_inference_steps=4, guidance_scale=4.0).images[0].save("in_diffusers.png")
