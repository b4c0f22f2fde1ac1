"""The VAE: what its interface promises; test_parity.py compares its tensors and numbers with the reference's."""

import helpers
import pytest
import torch
from parity import draw

from support.weights import read_config
from vae import VAE, VAEConfig


@pytest.fixture
def vae():
    return helpers.randomize(VAE(read_config(VAEConfig, helpers.VAE, "vae")), 0)


def test_log_variance_stays_where_its_exponential_is_finite(vae):
    vae.quant_conv.bias[4:] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    _, log_variance = vae.encode(draw(1, 3, 32, 32))
    assert log_variance.min() == -30 and log_variance.max() == 20
