"""The VAE: its tensors are the official ones, and what its interface promises."""

import diffusers
import pytest
import torch
from helpers import randomize
from parity import draw, without_class

from support import layouts
from support.bands import decode_in_bands
from support.weights import build, read_config
from vae import VAE, VAEConfig

SMALL = layouts.SD15["vae"] | {"block_out_channels": [32, 32, 64, 64]}


def test_names_and_shapes_of_all_tensors_are_the_official_ones():
    ours = build(VAE, read_config(VAEConfig, layouts.SD15["vae"], "vae")).state_dict()
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**without_class(layouts.SD15["vae"])).state_dict()
    assert {name: w.shape for name, w in ours.items()} == {name: w.shape for name, w in theirs.items()}
    assert (sum(w.numel() for w in ours.values()), len(ours)) == (83_653_863, 248)


def test_latents_are_eight_times_smaller_than_the_image():
    vae = randomize(VAE(read_config(VAEConfig, SMALL, "vae")), 0)
    mean, log_variance = vae.encode(draw(2, 3, 64, 40))
    assert mean.shape == log_variance.shape == (2, 4, 8, 5)
    assert vae.decode(mean).shape == (2, 3, 64, 40)


@pytest.mark.parametrize("rows", [3, 5, 16, 1000])
def test_decoding_in_bands_makes_the_same_image(rows):
    vae = randomize(VAE(read_config(VAEConfig, SMALL, "vae")), 0)
    z = draw(2, 4, 8, 5)
    torch.testing.assert_close(decode_in_bands(vae, z, rows), vae.decode(z).detach(), rtol=0, atol=2e-5)


def test_decoding_in_bands_no_convolution_sees_more_than_its_band_and_a_row_on_each_side():
    vae = randomize(VAE(read_config(VAEConfig, SMALL, "vae")), 0)
    heights = []
    for name, layer in vae.decoder.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and name.startswith(("up_blocks", "conv_out")):
            layer.register_forward_pre_hook(lambda layer, given: heights.append(given[0].shape[2]))
    decode_in_bands(vae, draw(1, 4, 8, 8), rows=4)
    assert max(heights) == 2 * (4 + 2)  # after an upsampling, two rows for one
    decode_in_bands(vae, draw(1, 4, 8, 8), rows=64)
    assert max(heights) == 64  # the whole image


def test_log_variance_stays_where_its_exponential_is_finite():
    vae = randomize(VAE(read_config(VAEConfig, SMALL, "vae")), 0)
    vae.quant_conv.bias[4:] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    _, log_variance = vae.encode(draw(1, 3, 32, 32))
    assert log_variance.min() == -30 and log_variance.max() == 20
