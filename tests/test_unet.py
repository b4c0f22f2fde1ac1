"""The UNet: what its interface promises; test_parity.py compares its tensors and numbers with the reference's."""

import pytest
import torch
from helpers import UNET, UNET_XL
from parity import draw

from support.weights import read_config
from unet import UNet, UNetConfig


def make(settings):
    return UNet(read_config(UNetConfig, settings, "unet"))


def test_gradients_reach_every_parameter():
    network = make(UNET)
    network(draw(1, 4, 16, 16), torch.tensor([500]), draw(1, 77, 32, seed=2)).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in network.parameters())


def test_sdxl_without_its_extra_conditions_is_an_error():
    with torch.device("meta"), pytest.raises(ValueError, match="needs pooled and time_ids"):
        make(UNET_XL)(torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 77, 80))
