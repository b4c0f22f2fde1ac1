"""The table of memory is a sum: its parts are those of a real update."""

import copy

import pytest
import torch
from helpers import UNET

from support.weights import read_config
from tools.memory import activations, fixed
from unet import UNet, UNetConfig


def small() -> UNet:
    return UNet(read_config(UNetConfig, UNET, "unet"))


def held(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_weights_gradients_moments_and_ema_are_those_of_an_update():
    unet = small()
    ema, optimizer = copy.deepcopy(unet), torch.optim.AdamW(unet.parameters())
    unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 32)).sum().backward()
    optimizer.step()
    parts = fixed({"unet": unet, "vae": torch.nn.Linear(10, 10), "text_encoder": torch.nn.Linear(3, 5)})
    weights = held(unet.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert parts["student, fp32"] == weights == held(ema.parameters()) == parts["EMA"]
    assert parts["gradients"] == held(weight.grad for weight in unet.parameters())
    assert parts["AdamW's moments"] == held(moments)
    assert parts["teacher, bf16"] == held(copy.deepcopy(unet).bfloat16().parameters())
    assert parts["VAE, fp32"] == 110 * 4 and parts["text encoders, bf16"] == 20 * 2


@pytest.mark.slow
def test_activations_are_those_that_a_real_forward_pass_saves():
    unet, saved = small().bfloat16(), {}
    weights = {weight.untyped_storage()._cdata for weight in unet.parameters()}

    def save(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        unet(*(x.bfloat16() for x in (torch.randn(2, 4, 8, 8), torch.tensor([5, 6]), torch.randn(2, 77, 32))))
    real = held(saved.values())
    counted = activations(unet.cfg, batch=2, pixels=64, recompute=False)
    assert 0.8 * real < counted < 1.25 * real  # the CPU's attention keeps a little more than a GPU's
    assert activations(unet.cfg, 2, 64, recompute=True) < 0.5 * counted
    assert 1.9 < activations(unet.cfg, 4, 64, False) / counted < 2.1
