"""A trained flow in diffusers: its own pipeline with a scheduler of 20 lines. Needs requirements-dev.txt.

    PYTHONPATH=. python docs/in_diffusers.py weights/proreflow-i "a red circle"

The same works with StableDiffusionXLPipeline. PeRFlow's scheduler reads our scheduler_config.json as well.
"""

import sys

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import reflow


class FlowScheduler(DDIMScheduler):
    """Windowed Euler steps, for a pipeline whose folder was written by train.py."""

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        self.grid = reflow.sampling_grid(num_inference_steps, self.config.num_time_windows)
        self.num_inference_steps, self.timesteps = num_inference_steps, self.grid[:-1].to(device)

    def step(self, eps: torch.Tensor, tau: torch.Tensor, z: torch.Tensor, return_dict: bool = True, **_):
        at = (self.grid == tau.item()).nonzero().item()
        settings = self.alphas_cumprod.to(z.device), self.config.num_time_windows, self.config.prediction_type
        velocity = reflow.as_velocity(lambda *_: eps, *settings)
        return (reflow.euler(velocity, z, self.grid[at : at + 2].to(z.device)),)


def load(folder: str) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = FlowScheduler.from_config(pipeline.scheduler.config)
    return pipeline


if __name__ == "__main__":
    pipe = load(sys.argv[1])
    pipe(sys.argv[2], num_inference_steps=4, guidance_scale=4.0).images[0].save("in_diffusers.png")
