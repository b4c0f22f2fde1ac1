"""Memory and work are counted as a real update takes them."""

import argparse
import copy

import pytest
import torch
from helpers import UNET, exit_code

import train
from model import StableDiffusion
from paper import variants
from support import lora, memory
from support.datasets import Scenes
from support.latents import cache
from support.weights import read_config
from unet import RECOMPUTED, UNet, UNetConfig

pytestmark = pytest.mark.slow
GIVEN = torch.randn(2, 4, 8, 8), torch.tensor([5, 6]), torch.randn(2, 77, 32)


def small() -> UNet:
    return UNet(read_config(UNetConfig, UNET, "unet"))


def count(world=1, **given):
    """For the small UNet, a VAE of 110 weights and a text encoder of 20."""
    settings = {"batch_size": 2, "grad_accum_steps": 1, "lora": None, "base": "a", "teacher": "a", "solver_steps": 0}
    settings |= {"teacher_guidance": 1.0, "reuse": 1}
    args = argparse.Namespace(**settings | {"gradient_checkpointing": False} | given)
    networks = {"unet": small(), "vae": torch.nn.Linear(10, 10), "text_encoder": torch.nn.Linear(3, 5)}
    return memory.count(networks, (4, 8, 8), args, world, RECOMPUTED)


def held(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("rank", [None, 3])
def test_weights_gradients_moments_and_ema_are_those_of_an_update(rank):
    base = small().requires_grad_(False)
    student = lora.attach(base, rank, 0) if rank else copy.deepcopy(base)
    ema, optimizer = copy.deepcopy(student), torch.optim.AdamW(student.requires_grad_(True).parameters())
    student(*GIVEN).sum().backward()
    optimizer.step()
    parts, _ = count(lora=rank, teacher="b")
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert parts["trained weights"] == held(student.parameters()) == held(ema.parameters()) == parts["EMA"]
    assert parts["gradients"] == held(weight.grad for weight in student.parameters())
    assert parts["AdamW's moments"] == held(moments) == 4 * count(4, lora=rank)[0]["AdamW's moments"]
    assert parts["frozen UNet"] == held(copy.deepcopy(base).bfloat16().parameters())
    assert parts.get("update of the teacher") == (parts["EMA"] if rank else None)
    assert parts["VAE"] == 110 * 4 and parts["text encoders"] == 20 * 2


@pytest.mark.parametrize("rank", [None, 3])
def test_activations_are_those_that_a_real_forward_pass_saves(rank):
    base, saved = small().bfloat16().requires_grad_(False), {}
    student = (lora.attach(base, rank, 0).bfloat16() if rank else base).requires_grad_(True)

    weights = {weight.untyped_storage()._cdata for weight in student.parameters()}

    def save(tensor):
        if tensor.grad_fn is not None and tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        student(*(x.bfloat16() for x in GIVEN))
    counted = count(lora=rank)[0]["activations"]
    assert 0.8 * held(saved.values()) < counted < 1.25 * held(saved.values())  # attention keeps more on a CPU
    assert count(lora=rank, gradient_checkpointing=True)[0]["activations"] < 0.5 * counted
    assert 1.9 < count(lora=rank, batch_size=4)[0]["activations"] / counted < 2.1


def test_flop_are_those_of_all_passes():
    full, update = count()[1], count(lora=3)[1]
    forward = count(solver_steps=1)[1] - full
    assert full == 3 * forward and 2 * forward < update < full  # LoRA: no gradient of the base's weights
    assert count(solver_steps=2, teacher_guidance=3)[1] == full + 2 * 2 * forward
    assert count(solver_steps=2, teacher_guidance=3, reuse=4)[1] == full + forward
    assert count(gradient_checkpointing=True)[1] == 4 * forward and count(grad_accum_steps=5)[1] == 5 * full


def test_a_dry_run_prints_and_starts_nothing(sd15, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Process, "start", lambda _: 1 / 0)
    cache(StableDiffusion.load(sd15), Scenes(0), 2, tmp_path / "latents")
    command = ["--stage", 1, "--model", sd15, "--data", tmp_path / "latents", "--out", tmp_path / "out"]
    command += ["--batch-size", 2, "--iters", 100, "--dry-run"]
    assert exit_code(variants, *command, 1e-3) == 0
    lines = capsys.readouterr().out.splitlines()
    flop = float(lines[-2].split()[0])
    assert "in all on each GPU" in lines[-3] and float(lines[-1].split()[0]) == pytest.approx(
        flop * 1e5 / 3600, abs=0.3
    )
    assert not (tmp_path / "out").exists()
    assert exit_code(variants, *command, "--lora", 2) == 0
    assert exit_code(variants, "--stage", 2, *command[2:]) == 2
    assert "train stage 1 first" in capsys.readouterr().err
