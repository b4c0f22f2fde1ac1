"""What is not ours is refused by name, however a model's files say it.

Supported are models that predict noise (epsilon) on Stable Diffusion's noise schedule, and their flows. Others
often have the same tensors in the same shapes. They would load without an error and draw noise or gray images.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from support.errors import InputError

# What a network's config.json may say beside the fields that we read and null: other values would need code that is not
# here. `...` stands for any value, of a setting that changes nothing in the network.
ONLY = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpDecoderBlock2D"), "addition_embed_type": ("text_time",),
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False, "class_embeddings_concat": False,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1, "dropout": 0.0, "attention_dropout": 0.0,
    "dual_cross_attention": False, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "time_embedding_type": "positional",
    "upcast_attention": False, "addition_embed_type_num_heads": 64, "mid_block_add_attention": True,
    "use_quant_conv": True, "use_post_quant_conv": True, "hidden_act": ("quick_gelu", "gelu"),
    "model_type": "clip_text_model", "decay": ..., "min_decay": ..., "inv_gamma": ..., "power": ...,
    "optimization_step": ..., "update_after_step": ..., "use_ema_warmup": ..., "bos_token_id": ...,
    "pad_token_id": ..., "initializer_factor": ..., "initializer_range": ..., "torch_dtype": ..., "dtype": ...,
    "transformers_version": ...,
}  # fmt: skip

# Scheduler classes that sample epsilon diffusion models. Which of them a folder names makes no difference here.
SAMPLERS = """DDIM DDIMParallel DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete
    KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE DEISMultistep
    UniPCMultistep SASolver"""
SAMPLERS = [f"{name}Scheduler" for name in SAMPLERS.split()]

# Scheduler setting: (what it may be, what the libraries take where it is left out)
SCHEDULE = {
    "beta_schedule": (["scaled_linear"], "linear"), "beta_start": ([0.00085], 0.0001), "beta_end": ([0.012], 0.02),
    "num_train_timesteps": ([1000], 1000), "prediction_type": (["epsilon"], "epsilon"), "trained_betas": ([None], None),
    "rescale_betas_zero_snr": ([False], False), "use_flow_sigmas": ([False], False),
    "timestep_type": (["discrete"], "discrete"),
}  # fmt: skip
PERFLOW_SCHEDULE = {  # its own defaults are Stable Diffusion's, and it takes any betas
    "beta_schedule": (["scaled_linear"], "scaled_linear"), "num_train_timesteps": ([1000], 1000),
    "trained_betas": ([None], None), "t_noise": ([1], 1), "t_clean": ([0], 0),
    "prediction_type": (["ddim_eps", "diff_eps"], "ddim_eps"),
}  # fmt: skip

# Beginnings of tensor names in single files of other models
OTHERS = {
    "cond_stage_model.model.": "Stable Diffusion 2", "conditioner.embedders.0.model.": "the SDXL refiner",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3", "model.diffusion_model.double_blocks.": "FLUX",
    "double_blocks.": "FLUX", "lora_": "a LoRA; merge it into a model first", "control_model.": "a ControlNet",
    "v_pred": "a model that predicts v, not epsilon (tensor v_pred)", "ztsnr": "a model with zero terminal SNR",
    "zero_terminal_snr": "a model with zero terminal SNR",
    "edm_": "an EDM model, with another noise schedule", "edm_vpred": "an EDM model that predicts v",
}  # fmt: skip
ARCHITECTURES = {
    "SD1.5": ("stable-diffusion-v1", "stable-diffusion-v1-5"),
    "SDXL": ("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1"),
}
FLAGS = ("ss_v_parameterization", "ss_zero_terminal_snr", "ss_v2", "v_pred", "ztsnr")  # of a header's metadata


def is_perflow(scheduler: dict) -> bool:
    """Whether a flow was published by PeRFlow, whose networks take tau itself as their index."""
    return scheduler.get("_class_name") == "PeRFlowScheduler"


def check_scheduler(scheduler: dict, where: str | Path) -> None:
    """Raise InputError unless these settings are Stable Diffusion's schedule, for predicting epsilon."""
    name = scheduler.get("_class_name", SAMPLERS[0])
    if name not in (*SAMPLERS, "PeRFlowScheduler"):
        raise InputError(f"{where}: the scheduler {name} is not supported: it is for another kind of model")
    for name, (wanted, left_out) in (PERFLOW_SCHEDULE if is_perflow(scheduler) else SCHEDULE).items():
        value = scheduler.get(name, left_out)
        if value not in wanted and not (value is None and left_out is False):
            said = "left out, which means " if name not in scheduler else ""
            only = " and ".join(map(repr, wanted))
            raise InputError(f"{where}: scheduler {name} = {said}{value!r} is not supported, only {only}")
    for name in "beta_start", "beta_end", "trained_guidance":
        value, most = scheduler.get(name, 0.01), 1 if name.startswith("beta") else 100
        if type(value) not in (int, float) or not 0 < value < most:
            raise InputError(f"{where}: scheduler {name} = {value!r} is not a number between 0 and {most}")
    windows = scheduler.get("num_time_windows", 4)
    if type(windows) is not int or not 1 <= windows <= 1000:
        raise InputError(f"{where}: scheduler num_time_windows = {windows!r} is not a number from 1 to 1000")


def check_metadata(metadata: dict[str, str], family: str, where: Path) -> None:
    """Raise InputError where the header of a single file says that it holds another kind of model."""
    for key, value in metadata.items():
        name, said = key.rpartition(".")[2].lower(), value.lower()
        is_flag = name in FLAGS and said not in ("false", "0", "none", "")
        another = name in ("prediction_type", "predict_key") and said not in ("epsilon", "eps", "")
        if name == "architecture" and key.startswith("modelspec."):
            another = said not in ARCHITECTURES[family]
        if is_flag or another and not key.startswith("scheduler."):
            raise InputError(f"{where}: its metadata says {key} = {value}; only {family} that predicts epsilon is ours")


def check_buffers(file: Path, names: list[str], alphas_cumprod: Tensor) -> None:
    """Raise InputError where a single file holds the noise schedule that it was trained with, and it is another one."""
    a = alphas_cumprod.double()
    schedule = {
        "alphas_cumprod": a, "sqrt_alphas_cumprod": a.sqrt(), "betas": 1 - a / torch.cat([torch.ones(1), a[:-1]]),
        "denoiser.sigmas": ((1 - a) / a).sqrt(),
    }  # fmt: skip
    with safe_open(file, framework="pt") as tensors:
        for name in schedule.keys() & set(names):
            found, wanted = (t.double().flatten().sort().values for t in (tensors.get_tensor(name), schedule[name]))
            if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0.02, atol=1e-4):
                raise InputError(f"{file}: its {name} is another noise schedule than Stable Diffusion's; not supported")


def check_fit(networks: dict[str, nn.Module], tokenizers: list, path: Path) -> None:
    """Raise InputError where the parts of a model do not fit together."""
    encoders = [networks[name].cfg for name in networks if name.startswith("text_encoder")]
    for tokenizer, cfg in zip(tokenizers, encoders):
        tokens, rows, end = tokenizer.bpe.get_vocab_size(), cfg.vocab_size, tokenizer.end
        if tokens > rows or cfg.eos_token_id not in (2, end):  # its ids would be other words to the text encoder
            ours, theirs = f"{tokens} tokens, {end} the last of a text", f"{rows}, {cfg.eos_token_id}"
            raise InputError(f"{path}: the tokenizer has {ours}, the text encoder {theirs}; they do not fit")
        if tokenizer.length > cfg.max_position_embeddings:
            lengths = f"{tokenizer.length} tokens long, the text encoder takes {cfg.max_position_embeddings}"
            raise InputError(f"{path}: the tokenizer's texts are {lengths}; correct model_max_length")
    if len({tokenizer.length for tokenizer in tokenizers}) > 1:
        raise InputError(f"{path}: the two tokenizers' texts differ in length; correct model_max_length")
    unet, vae, width = networks["unet"].cfg, networks["vae"].cfg, sum(cfg.hidden_size for cfg in encoders)
    if unet.cross_attention_dim != width:
        raise InputError(f"{path}: the UNet expects text of width {unet.cross_attention_dim}, not {width}")
    sizes = encoders[-1].projection_dim + 6 * (unet.addition_time_embed_dim or 0) if len(encoders) == 2 else None
    if sizes != (unet.projection_class_embeddings_input_dim if unet.addition_embed_type else None):
        found = unet.projection_class_embeddings_input_dim
        raise InputError(f"{path}: the UNet takes {found} numbers of pooled text and sizes, the encoders make {sizes}")
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise InputError(
            f"{path}: the UNet maps {unet.in_channels} channels to {unet.out_channels}, the latents have "
            f"{vae.latent_channels}; only text-to-image models are supported, not inpainting or editing ones"
        )
