"""The VAE: what its interface promises; test_parity.py compares its tensors and numbers with the reference's."""

import helpers
import pytest
import torch
from parity import draw

from support.bands import decode_in_bands
from support.weights import read_config
from vae import VAE, VAEConfig


@pytest.fixture
def vae():
    return helpers.randomize(VAE(read_config(VAEConfig, helpers.VAE, "vae")), 0)


@pytest.mark.parametrize("rows", [3, 5, 16, 1000])
def test_decoding_in_bands_makes_the_same_image(vae, rows):
    z = draw(2, 4, 8, 5)
    torch.testing.assert_close(decode_in_bands(vae, z, rows), vae.decode(z), rtol=0, atol=2e-5)


def test_decoding_in_bands_no_convolution_sees_more_than_its_band_and_a_row_on_each_side(vae):
    heights = []
    for name, layer in vae.decoder.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and name.startswith(("up_blocks", "conv_out")):
            layer.register_forward_pre_hook(lambda layer, given: heights.append(given[0].shape[2]))
    decode_in_bands(vae, draw(1, 4, 8, 8), rows=4)
    assert max(heights) == 2 * (4 + 2)  # after an upsampling, two rows for one
    decode_in_bands(vae, draw(1, 4, 8, 8), rows=64)
    assert max(heights) == 64  # the whole image


def test_log_variance_stays_where_its_exponential_is_finite(vae):
    vae.quant_conv.bias[4:] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    _, log_variance = vae.encode(draw(1, 3, 32, 32))
    assert log_variance.min() == -30 and log_variance.max() == 20
