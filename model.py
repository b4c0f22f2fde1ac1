"""Stable Diffusion put together: load and save a model folder, encode prompts, images <-> latents, noise schedule.

A model is a folder in the official layout: `model_index.json` and one folder each for `unet`, `vae`, `text_encoder`
(SDXL: also `text_encoder_2`), `tokenizer` (`tokenizer_2`) and `scheduler`. Diffusion models and the flows that
`train.py` makes of them differ in the scheduler's settings and in the weights, in nothing else.

Shapes: B batch, L = 77 tokens, D width of the text, H W image height and width, h w = H/8 W/8 those of the latents.
Read `clip_text.py`, `unet.py` and `vae.py` before this file, `reflow.py` after it.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_text import ClipText, ClipTextConfig, Tokenizer, load_tokenizers
from support import layouts
from support.checks import check_fit, check_scheduler, is_perflow
from support.errors import InputError
from support.files import replaced, write_json, write_tensors
from support.folders import STEMS, kept_dtype, read_folder
from support.official import SCHEDULER
from support.weights import assign, build, read_config
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

WEIGHTS = Path(__file__).parent / "weights"
MINIATURE = WEIGHTS / "miniature"  # a diffusion model
FLOW = WEIGHTS / "proreflow-i"  # the paper's ProReflow-I, trained from it: 4 windows

Conditions = tuple[Tensor, Tensor | None, Tensor | None]  # context (B, L, D); SDXL: pooled (B, 1280), time_ids (B, 6)

# GPUs would round the factors of float32 convolutions to 10 bits (TF32), and with them images and latents.
FULL_PRECISION = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)

NETWORKS = {
    "unet": (UNet, UNetConfig), "vae": (VAE, VAEConfig), "text_encoder": (ClipText, ClipTextConfig),
    "text_encoder_2": (ClipText, ClipTextConfig),
}  # fmt: skip


class StableDiffusion:
    """A whole text-to-image model: networks, tokenizers and settings. Made by `StableDiffusion.load`."""

    def __init__(self, networks: dict[str, nn.Module], tokenizers: list[Tokenizer], configs: dict[str, dict]):
        self.networks, self.tokenizers, self.configs = networks, tokenizers, configs
        self.unet: UNet = networks["unet"]
        self.vae: VAE = networks["vae"]
        self.text_encoders = [networks[name] for name in ("text_encoder", "text_encoder_2") if name in networks]
        self.alphas_cumprod = alphas_cumprod(configs["scheduler"]).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def windows(self) -> int | None:
        """Number of time windows of a flow; None for a diffusion model."""
        scheduler = self.configs["scheduler"]
        return scheduler.get("num_time_windows", 4 if is_perflow(scheduler) else None)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, in the names of `reflow.ddim_coefficients`: "ddim_eps", the noise of a DDIM step, as
        diffusion models do, too; or "diff_eps" (PeRFlow's SD1.5)."""
        scheduler = self.configs["scheduler"]
        return scheduler.get("prediction_type", "ddim_eps") if is_perflow(scheduler) else "ddim_eps"

    @property
    def guidance(self) -> float:
        """The default scale: 4, as the paper's; none (1) for a flow of guided trajectories (`paper/variants.py`)."""
        return 1.0 if "trained_guidance" in self.configs["scheduler"] else 4.0

    @property
    def downscale(self) -> int:
        """Pixels per latent, in each direction: 8 for all official models."""
        return 2 ** (len(self.vae.cfg.block_out_channels) - 1)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Prompts -> context (B, 77, D) and, for SDXL, pooled (B, 1280), else None.

        The empty prompt is the unconditional one. SDXL's is all zeros (`force_zeros_for_empty_prompt` in its
        `model_index.json`), and this is the one place that knows it: training and sampling cannot disagree.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of strings, not one string")
        pairs = zip(self.text_encoders, self.tokenizers)
        encoded = [encoder(self.send(tokenize(prompts))) for encoder, tokenize in pairs]
        if len(encoded) == 1:
            return encoded[0][0], None
        context = torch.cat([penultimate for _, penultimate, _ in encoded], dim=-1)
        pooled = encoded[1][2]
        if self.configs["model_index"].get("force_zeros_for_empty_prompt", True):
            empty = self.send(torch.tensor([prompt == "" for prompt in prompts]))
            context = context.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        return context, pooled

    def time_ids(self, batch: int, height: int, width: int) -> Tensor | None:
        """SDXL's image sizes (B, 6) for images made at height x width, uncropped; None for SD1.5."""
        if self.unet.cfg.addition_embed_type is None:
            return None
        return self.send(torch.tensor([[height, width, 0, 0, height, width]])).expand(batch, -1)

    def send(self, small: Tensor) -> Tensor:
        """Numbers from the CPU, sent to the device without waiting for what it is busy with."""
        return small.to(self.device, non_blocking=True)

    def conditions(self, prompts: list[str], height: int, width: int) -> Conditions:
        """What the UNet is given besides latents and time, for images of height x width pixels."""
        return *self.encode_prompt(prompts), self.time_ids(len(prompts), height, width)

    def epsilon(
        self, conditions: Conditions, guidance_scale: float = 1.0, uncond: Conditions | None = None, unet=None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(z, tau) -> the noise predicted in z, fp32, with classifier-free guidance (Ho & Salimans 2022):

            eps = eps(uncond) + guidance_scale (eps(conditions) - eps(uncond))

        Both come from one batch of twice the size. A scale of 1 needs no uncond and half the work. unet: predicts
        instead of this model's own, as a student does in training.
        """
        unet = unet or self.unet
        dtype = next(unet.parameters()).dtype
        shift = 0 if is_perflow(self.configs["scheduler"]) else 1  # the network's own index, see reflow.py
        if guidance_scale == 1:
            return lambda z, tau: unet(z.to(dtype), tau - shift, *conditions).float()
        both = [c if c is None else torch.cat([u.expand_as(c), c]) for u, c in zip(uncond, conditions)]

        def guided(z: Tensor, tau: Tensor) -> Tensor:
            eps = unet(torch.cat([z, z]).to(dtype), torch.cat([tau, tau]) - shift, *both).float()
            negative, positive = eps.chunk(2)
            return negative + guidance_scale * (positive - negative)

        return guided

    @torch.no_grad()
    @FULL_PRECISION
    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance of their latents, (B, 4, h, w) each, unscaled."""
        weight = self.vae.encoder.conv_in.weight
        parts = [self.vae.encode(few.to(weight.device, weight.dtype)) for few in self.few_at_a_time(images)]
        mean, log_variance = (torch.cat(part) for part in zip(*parts))
        return mean, log_variance

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> mean of their latents (B, 4, h, w) at the UNet's scale, in its dtype."""
        return (self.encode_moments(images)[0] * self.vae.cfg.scaling_factor).to(self.dtype)

    @torch.no_grad()
    @FULL_PRECISION
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) at the UNet's scale -> images (B, 3, H, W) in [-1, 1], fp32.

        Raises InputError where the latents are not finite.
        """
        if not latents.isfinite().all():
            raise InputError("the UNet's numbers are not finite; use --dtype float32, and look at the model's files")
        weight = self.vae.decoder.conv_in.weight
        scaled = latents.to(weight.device, weight.dtype) / self.vae.cfg.scaling_factor
        few = self.few_at_a_time(scaled, self.downscale)
        images = torch.cat([self.vae.decode(part).float() for part in few])
        if images.isfinite().all():
            return images.clamp(-1, 1)
        if weight.dtype == torch.float32:
            raise InputError("the VAE's numbers are not finite; fetch its files again")
        print(f"notice: the VAE overflows in {weight.dtype}; it runs in float32 from now on", file=sys.stderr)
        self.vae.float()
        return self.decode(latents)

    @staticmethod
    def few_at_a_time(batch: Tensor, downscale: int = 1) -> tuple[Tensor, ...]:
        """Parts of a batch: 512 x 512 pixels, or one larger image. Of all networks, the VAE takes the most memory."""
        return batch.split(max(1, 512**2 // (batch.shape[2] * batch.shape[3] * downscale**2)))

    def image_size(self, size: int | None = None) -> int:
        """Height and width in pixels: `size`, or the model's default. Raises InputError if it does not fit."""
        if size is None:
            default = self.unet.cfg.sample_size
            return (default if isinstance(default, int) else default[0]) * self.downscale
        if size < self.downscale or size % self.downscale:
            raise InputError(f"--size {size} does not fit: it must be a multiple of {self.downscale} pixels")
        return size

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
        tokenizer: str | Path | None = None,
        variant: str | None = None,
    ) -> "StableDiffusion":
        """Load a model folder, or a single `.safetensors` file of SD1.5 or SDXL.

        dtype None keeps that of the file. In float16, a VAE that may overflow is kept in float32 (`force_upcast`).
        tokenizer: folder of the tokenizer(s), instead of the model folder's own; single files need one. variant: of a
        folder's weight files, such as "fp16". All networks come frozen and in eval mode. Raises InputError.
        """
        path = Path(path)
        if path.is_dir():
            family, (configs, files) = None, read_folder(path, dtype, variant)
        else:
            family, configs, files = layouts.read_single_file(path, alphas_cumprod(SCHEDULER), variant)
        check_scheduler(configs["scheduler"], path)
        networks = {}
        for name in files:
            network_class, config_class = NETWORKS[name]
            if name == "text_encoder_2":  # some folders leave out that it projects its sentence vector
                configs[name]["architectures"] = ["CLIPTextModelWithProjection"]
            where = f"{path}: {name} config"
            networks[name] = build(network_class, read_config(config_class, configs[name], where), where)
            sources = layouts.sources(family, name, networks[name].state_dict(), files[name].keys())
            kept = kept_dtype(dtype, name, configs[name])
            assign(networks[name], sources, files[name], device, kept, f"{path}: {name}")
        tokenizers = load_tokenizers(Path(tokenizer or path), two="text_encoder_2" in networks)
        check_fit(networks, tokenizers, path)
        return cls(networks, tokenizers, configs)

    def save(self, path: str | Path) -> None:
        """Write a model folder that `load`, diffusers and transformers open; or a single `.safetensors` file, if the
        path ends so. It appears whole or not at all."""
        path = Path(path).resolve()
        if path.suffix == ".safetensors":
            return write_tensors(path, *layouts.single_file(self.networks, self.configs["scheduler"], path))
        empty = path.is_dir() and not any(path.iterdir())
        if path.exists() and not empty and not (path / "model_index.json").exists():
            raise InputError(f"{path} exists and is not a model folder; remove it, or choose another place")
        with replaced(path) as aside:
            write_json(aside / "model_index.json", self.model_index())
            write_json(aside / "scheduler/scheduler_config.json", self.configs["scheduler"])
            for name, network in self.networks.items():
                # transformers would keep float16, diffusers reads everything as float32: this keeps them together
                as_float32 = {"dtype": "float32"} if name.startswith("text_encoder") else {}
                write_json(aside / name / "config.json", self.configs[name] | as_float32)
                write_tensors(aside / name / f"{STEMS[name]}.safetensors", network.state_dict())
            for tokenizer, folder in zip(self.tokenizers, ("tokenizer", "tokenizer_2")):
                (aside / folder).mkdir()
                for name, content in tokenizer.files.items():
                    (aside / folder / name).write_bytes(content)

    def model_index(self) -> dict:
        """Which library's class each part is of; parts that we do not read, such as a safety checker, are left out."""
        index, ours = self.configs["model_index"], {*self.networks, "tokenizer", "tokenizer_2", "scheduler"}
        others = [name for name, value in index.items() if isinstance(value, list) and name not in ours]
        sampler = self.configs["scheduler"].get("_class_name", "DDIMScheduler")
        sampler = {} if sampler == "PeRFlowScheduler" else {"scheduler": ["diffusers", sampler]}
        return index | dict.fromkeys(others, [None, None]) | sampler


def save_flow(unet: UNet, scheduler: dict, base: StableDiffusion | Path, out: Path, dtype: torch.dtype) -> None:
    """Write a flow as a complete model folder: this UNet and scheduler, and all other parts of `base`.

    A loaded base is written from memory: its folder may be gone by now. The parts are copies, so nothing done to the
    base's files changes the flow later. On disk, a flow takes 2.5 GB for SD1.5 and 8.7 GB for SDXL.
    """
    base = base if isinstance(base, StableDiffusion) else StableDiffusion.load(base, dtype=None)
    half = build(UNet, unet.cfg)
    half.load_state_dict({name: weight.detach().to(dtype) for name, weight in unet.state_dict().items()}, assign=True)
    networks, configs = base.networks | {"unet": half}, base.configs | {"scheduler": scheduler}
    StableDiffusion(networks, base.tokenizers, configs).save(out)


def alphas_cumprod(scheduler: dict) -> Tensor:
    """Stable Diffusion's noise schedule, (1000,), fp32: at index i, latents are sqrt(a_i) z + sqrt(1 - a_i) noise.

    The square roots of the betas run linearly from start to end ("scaled_linear"); a_i is the product of 1 - beta.
    """
    start, end = scheduler.get("beta_start", 0.00085), scheduler.get("beta_end", 0.012)
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(dim=0).float()
