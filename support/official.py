"""The official configurations of SD1.5 and SDXL: what single files leave out, and what the tests and tools measure."""

from support.checks import is_perflow

VAE_SD15 = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "force_upcast": False,
}  # fmt: skip
CLIP_L = {
    "architectures": ["CLIPTextModel"], "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "quick_gelu",
    "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
    "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False,
    "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
PIPELINE = {
    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
SD15 = {
    "model_index": PIPELINE | {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False},
    "unet": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "in_channels": 4, "layers_per_block": 2,
        "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": VAE_SD15,
    "text_encoder": CLIP_L,
    "scheduler": SCHEDULER,
}  # fmt: skip
SDXL = {
    "model_index": PIPELINE | {
        "_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    },
    "unet": SD15["unet"] | {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "use_linear_projection": True,
    },
    "vae": VAE_SD15 | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_L | {
        "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
        "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
    },
    "scheduler": SCHEDULER,
}  # fmt: skip
OFFICIAL = {"SD1.5": SD15, "SDXL": SDXL}


def flow_scheduler(teacher, windows: int, guidance: float = 1.0, prediction_type: str = "epsilon") -> dict:
    """The scheduler settings of a flow trained from the model `teacher`: plain DDIM with trailing spacing, one step a
    window, and the number of windows. PeRFlow's flows stay PeRFlow's, and "ddim_eps" or "diff_eps" make one.

    guidance: that the teacher's trajectories had.
    """
    before = teacher.configs["scheduler"]
    if prediction_type != "epsilon":
        scheduler = SCHEDULER | {"_class_name": "PeRFlowScheduler", "prediction_type": prediction_type}
    elif is_perflow(before):
        scheduler = before
    else:
        scheduler = SCHEDULER | {"timestep_spacing": "trailing"}
    learned = before.get("trained_guidance", 1.0) if guidance == 1 else guidance
    return scheduler | {"num_time_windows": windows} | ({} if learned == 1 else {"trained_guidance": learned})
