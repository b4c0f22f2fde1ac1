"""Stable Diffusion put together: load and save a model folder, encode prompts, images <-> latents, noise schedule.

A model is a folder in the official layout: `model_index.json` and one folder each for `unet`, `vae`, `text_encoder`
(SDXL: also `text_encoder_2`), `tokenizer` (`tokenizer_2`) and `scheduler`. Diffusion models and the flows that
`train.py` makes of them differ in the scheduler's settings and in the weights, in nothing else.

Shapes: B batch, L = 77 tokens, D width of the text, H W image height and width, h w = H/8 W/8 those of the latents.
Read `clip_text.py`, `unet.py` and `vae.py` before this file, `reflow.py` after it.
"""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clip_text import ClipText, ClipTextConfig, Tokenizer
from support import layouts
from support.bands import decode_in_bands
from support.errors import InputError
from support.files import PICKLES, read_json, replace_folder, write_json, write_tensors
from support.weights import assign, build, find_tensors, read_config, tensor_names
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

WEIGHTS = Path(__file__).parent / "weights"
MINIATURE = WEIGHTS / "miniature"  # a diffusion model
FLOW = WEIGHTS / "proreflow-i"  # the paper's ProReflow-I, trained from it: 4 windows

Conditions = tuple[Tensor, Tensor | None, Tensor | None]  # context (B, L, D); SDXL: pooled (B, 1280), time_ids (B, 6)

# component: its network, its settings, the name of its weight files
NETWORKS = {
    "unet": (UNet, UNetConfig, "diffusion_pytorch_model"),
    "vae": (VAE, VAEConfig, "diffusion_pytorch_model"),
    "text_encoder": (ClipText, ClipTextConfig, "model"),
    "text_encoder_2": (ClipText, ClipTextConfig, "model"),
}


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
        return scheduler.get("num_time_windows", 4) if is_flow(scheduler) else None

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, in the names of `reflow.ddim_coefficients`: "ddim_eps", the noise of a DDIM step, as
        diffusion models do, too; or "diff_eps" (PeRFlow's SD1.5)."""
        scheduler = self.configs["scheduler"]
        return scheduler.get("prediction_type", "ddim_eps") if is_perflow(scheduler) else "ddim_eps"

    @property
    def guidance(self) -> float:
        """The default guidance scale: 4, as the paper's; 1 for a flow that learned guided trajectories."""
        return self.guidance_or_none(4.0)

    def guidance_or_none(self, scale: float) -> float:
        """`scale`; or 1, which is no guidance, for a flow that learned guided trajectories (`paper/variants.py`)."""
        return 1.0 if "trained_guidance" in self.configs["scheduler"] else scale

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
        encoded = [
            encoder(self.send(tokenize(prompts))) for encoder, tokenize in zip(self.text_encoders, self.tokenizers)
        ]
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
    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance of their latents, (B, 4, h, w) each, unscaled."""
        weight = self.vae.encoder.conv_in.weight
        parts = [self.vae.encode(few.to(weight.device, weight.dtype)) for few in self.few_at_a_time(images)]
        mean, log_variance = (torch.cat(part) for part in zip(*parts))
        return mean, log_variance

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, 4, h, w) at the UNet's scale, in its dtype.

        They are the mean of the encoder's distribution; with standard normal noise (B, 4, h, w), a sample of it.
        """
        mean, log_variance = self.encode_moments(images)
        if noise is not None:
            mean = mean + (0.5 * log_variance).exp() * noise.to(mean)
        return (mean * self.vae.cfg.scaling_factor).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor, low_memory: bool = False) -> Tensor:
        """Latents (B, 4, h, w) at the UNet's scale -> images (B, 3, H, W) in [-1, 1], fp32.

        low_memory: and of an image, a few rows at a time (`support/bands.py`).
        """
        weight = self.vae.decoder.conv_in.weight
        scaled = latents.to(weight.device, weight.dtype) / self.vae.cfg.scaling_factor
        few = self.few_at_a_time(scaled, self.downscale)
        images = [decode_in_bands(self.vae, part) if low_memory else self.vae.decode(part) for part in few]
        return torch.cat([image.float() for image in images]).clamp(-1, 1)

    @staticmethod
    def few_at_a_time(batch: Tensor, downscale: int = 1) -> tuple[Tensor, ...]:
        """Parts of a batch with the pixels of one image of 512 x 512 each, or one larger image: of all networks, the
        VAE takes the most memory."""
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
    ) -> "StableDiffusion":
        """Load a model folder, or a single `.safetensors` file of SD1.5 or SDXL.

        dtype None keeps that of the file. In float16, a VAE that overflows there is kept in float32.
        tokenizer: folder of the tokenizer(s), instead of the model folder's own; single files need one.
        All networks come frozen and in eval mode. Raises InputError.
        """
        path = Path(path)
        family = None if path.is_dir() else family_of(path)
        configs, files = read_single_file(path, family) if family else read_folder(path, dtype)
        networks = {}
        for name in files:
            network_class, config_class, _ = NETWORKS[name]
            config = read_config(config_class, configs[name], f"{path}: {name} config")
            try:
                network = build(network_class, config)
            except Exception as error:  # torch has many ways to say that a size is impossible
                reason = str(error).partition("\n")[0]
                raise InputError(f"{path}: {name} config: {reason}") from error
            keys = network.state_dict().keys()
            if family:
                sources = layouts.sources_in_single_file(family, name, keys, files[name])
            else:
                sources = layouts.sources_in_folder(name, keys, files[name].keys())
            kept = kept_dtype(dtype, configs[name])
            assign(network, sources, files[name], device, kept, f"{path}: {name}")
            networks[name] = network
        tokenizers = load_tokenizers(Path(tokenizer or path), two="text_encoder_2" in networks)
        check_fit(networks, tokenizers, configs, path)
        return cls(networks, tokenizers, configs)

    def save(self, path: str | Path) -> None:
        """Write a model folder that `load`, diffusers and transformers open; or a single `.safetensors` file, if the
        path ends so. It appears whole or not at all."""
        path = Path(path).resolve()
        if path.suffix == ".safetensors":
            return write_file(path, self.as_single_file(path))
        empty = path.is_dir() and not any(path.iterdir())
        if path.exists() and not empty and not (path / "model_index.json").exists():
            raise InputError(f"{path} exists and is not a model folder; remove it, or choose another place")
        aside = path.with_name(path.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            for name, config in self.configs.items():
                file = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}.get(name)
                write_json(aside / (file or f"{name}/config.json"), config)
            for name, network in self.networks.items():
                file = aside / name / f"{NETWORKS[name][2]}.safetensors"
                write_tensors(file, network.state_dict())
            for tokenizer, folder in zip(self.tokenizers, ("tokenizer", "tokenizer_2")):
                for name, content in tokenizer.files.items():
                    (aside / folder).mkdir(exist_ok=True)
                    (aside / folder / name).write_bytes(content)
            replace_folder(aside, path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {path}: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def as_single_file(self, path: Path) -> dict[str, Tensor]:
        """All tensors under their names in a single file. It tells no settings, so only official ones can be stored."""
        family, tensors = "SDXL" if "text_encoder_2" in self.networks else "SD1.5", {}
        for name, network in self.networks.items():
            network_class, config_class, _ = NETWORKS[name]
            official = read_config(config_class, layouts.OFFICIAL[family][name], name)
            if shapes(build(network_class, official)) != shapes(network):
                reason = f"the {name} is none of {family}; a single file cannot tell what it is"
                raise InputError(f"{path}: {reason}: keep the folder")
            tensors |= layouts.as_single_file(family, name, network.state_dict())
        return tensors


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: weight.shape for key, weight in network.state_dict().items()}


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    write_tensors(path, tensors)


def read_folder(path: Path, dtype: torch.dtype | None) -> tuple[dict[str, dict], dict[str, dict[str, Path]]]:
    """Settings of a model folder's parts, and for each of its networks the file of every tensor."""
    configs = {"model_index": read_json(path / "model_index.json")}
    configs["scheduler"] = read_json(path / "scheduler/scheduler_config.json")
    names = [name for name in NETWORKS if name != "text_encoder_2" or (configs["model_index"].get(name) or [None])[0]]
    for name in names:
        configs[name] = read_json(path / name / "config.json")
    return configs, {
        name: find_tensors(path / name, NETWORKS[name][2], kept_dtype(dtype, configs[name])) for name in names
    }


def kept_dtype(dtype: torch.dtype | None, config: dict) -> torch.dtype | None:
    """The dtype that a network is kept in when `dtype` is asked for: a VAE that overflows float16 stays in float32."""
    return torch.float32 if dtype == torch.float16 and config.get("force_upcast") else dtype


def family_of(file: Path) -> str:
    try:
        return layouts.family_of(tensor_names(file))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{file}: {error}") from None


def read_single_file(file: Path, family: str) -> tuple[dict[str, dict], dict[str, dict[str, Path]]]:
    """The same of a single file, whose settings are the official ones of its family."""
    names = tensor_names(file)
    parts = layouts.PREFIXES[family].items()
    files = {part: {name: file for name in names if name.startswith(prefix)} for part, prefix in parts}
    return copy.deepcopy(layouts.OFFICIAL[family]), files


def load_tokenizers(path: Path, two: bool) -> list[Tokenizer]:
    """The tokenizers of a model folder, or of a folder that is one tokenizer; SDXL has `two`."""
    if path.is_file():
        raise InputError(f"{path}: a single file holds no tokenizer; give the folder of one (tokenizer=, --tokenizer)")
    folder = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    try:
        tokenizers = [Tokenizer.load(folder)]
        if two and (path / "tokenizer_2").is_dir():
            tokenizers.append(Tokenizer.load(path / "tokenizer_2"))
        elif two:  # the second one is the same, but for its padding
            tokenizers.append(Tokenizer.load(folder, pad_token="!"))
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    return tokenizers


def check_fit(
    networks: dict[str, nn.Module], tokenizers: list[Tokenizer], configs: dict[str, dict], path: Path
) -> None:
    """Raise InputError where the parts of a model do not fit together, or need code that is not here."""
    for tokenizer, name in zip(tokenizers, ("text_encoder", "text_encoder_2")):
        tokens, rows = tokenizer.bpe.get_vocab_size(), networks[name].cfg.vocab_size
        if tokens != rows:  # its ids would be other words to the text encoder
            raise InputError(f"{path}: the tokenizer knows {tokens} tokens, the {name} {rows}; they do not fit")
    text_width = sum(networks[name].cfg.hidden_size for name in networks if name.startswith("text_encoder"))
    unet, vae = networks["unet"].cfg, networks["vae"].cfg
    if unet.cross_attention_dim != text_width:
        raise InputError(f"{path}: the UNet expects text of width {unet.cross_attention_dim}, not {text_width}")
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise InputError(
            f"{path}: the UNet maps {unet.in_channels} channels to {unet.out_channels}, the latents have "
            f"{vae.latent_channels}; only text-to-image models are supported, not inpainting or editing ones"
        )
    scheduler = configs["scheduler"]
    known = ("ddim_eps", "diff_eps") if is_perflow(scheduler) else ("epsilon",)
    for name, values in {
        "prediction_type": known, "beta_schedule": ("scaled_linear",), "num_train_timesteps": (1000,),
        "trained_betas": (None,), "rescale_betas_zero_snr": (False, None),
    }.items():  # fmt: skip
        if scheduler.get(name, values[0]) not in values:
            raise InputError(f"{path}: scheduler {name} = {scheduler[name]!r} is not supported, only {values[0]!r}")
    for name, least, most in ("num_time_windows", 1, 1000), ("beta_start", 0, 1), ("beta_end", 0, 1):
        value = scheduler.get(name, most)
        if not isinstance(value, int | float) or not least <= value <= most:
            raise InputError(f"{path}: scheduler {name} = {value!r} is not a number from {least} to {most}")


def is_flow(scheduler: dict) -> bool:
    return is_perflow(scheduler) or "num_time_windows" in scheduler


def is_perflow(scheduler: dict) -> bool:
    """Whether a flow was published by PeRFlow, whose networks take tau itself as their index."""
    return scheduler.get("_class_name") == "PeRFlowScheduler"


def flow_scheduler(teacher: StableDiffusion, windows: int, guidance: float = 1.0) -> dict:
    """The scheduler settings of a flow trained from `teacher`: plain DDIM with trailing spacing, one step a window, and
    the number of windows. PeRFlow's flows stay PeRFlow's. guidance: that the teacher's trajectories had."""
    scheduler = teacher.configs["scheduler"] | {"num_time_windows": windows}
    if not is_perflow(scheduler):
        scheduler |= {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "timestep_spacing": "trailing"}
        scheduler |= {"clip_sample": False, "set_alpha_to_one": False}
    return scheduler | ({} if guidance == 1 else {"trained_guidance": guidance})


def save_flow(unet: UNet, scheduler: dict, base: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a flow as a complete model folder: a new UNet and scheduler, and all other parts of `base`, hard-linked
    where the file system can. It appears whole or not at all."""
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    parts = [name for name in read_json(base / "model_index.json") if (base / name).is_dir()]
    files = [file for part in parts for file in sorted((base / part).rglob("*")) if file.is_file()]
    for file in [base / "model_index.json", *files]:
        new = aside / file.relative_to(base)
        weights_of_unet = file.parent == base / "unet" and file.name != "config.json"
        if file.suffix in PICKLES or weights_of_unet:
            continue
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), new)
        except OSError:
            shutil.copyfile(file, new)
    (aside / "scheduler/scheduler_config.json").unlink()  # else the link's other end would change, too
    write_json(aside / "scheduler/scheduler_config.json", scheduler)
    weights = {name: weight.to(dtype) for name, weight in unet.state_dict().items()}
    write_tensors(aside / f"unet/{NETWORKS['unet'][2]}.safetensors", weights)
    replace_folder(aside, out)


def alphas_cumprod(scheduler: dict) -> Tensor:
    """Stable Diffusion's noise schedule, (1000,), fp32: at index i, latents are sqrt(a_i) z + sqrt(1 - a_i) noise.

    The square roots of the betas run linearly from start to end ("scaled_linear"); a_i is the product of 1 - beta.
    """
    start, end = scheduler.get("beta_start", 0.00085), scheduler.get("beta_end", 0.012)
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(dim=0).float()
