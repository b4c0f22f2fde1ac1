"""The UNet: its tensors are the official ones, and what its interface promises."""

import diffusers
import pytest
import torch
from helpers import randomize
from parity import SMALL_SDXL_UNET, draw, without_class

from support import layouts
from support.weights import build, read_config
from unet import UNet, UNetConfig, sinusoids

SMALL = layouts.SD15["unet"] | {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 48}


def make(settings):
    torch.manual_seed(0)
    return randomize(UNet(read_config(UNetConfig, settings, "unet")), 0)


@pytest.mark.parametrize("family, parameters, tensors", [("SD1.5", 859_520_964, 686), ("SDXL", 2_567_463_684, 1680)])
def test_names_and_shapes_of_all_tensors_are_the_official_ones(family, parameters, tensors):
    settings = layouts.OFFICIAL[family]["unet"]
    ours = build(UNet, read_config(UNetConfig, settings, "unet")).state_dict()
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**without_class(settings)).state_dict()
    assert {name: w.shape for name, w in ours.items()} == {name: w.shape for name, w in theirs.items()}
    assert (sum(w.numel() for w in ours.values()), len(ours)) == (parameters, tensors)


def test_time_is_encoded_as_cosines_then_sines_of_falling_frequency():
    t = torch.tensor([0.0, 3.0])
    first, last = 1.0, 10000 ** (-159 / 160)
    code = sinusoids(t, 320)
    expected = torch.tensor([[1, 1, 0, 0], [3 * first, 3 * last, 3 * first, 3 * last]]).double()
    expected[1] = torch.cat([expected[1, :2].cos(), expected[1, 2:].sin()])
    torch.testing.assert_close(code[:, [0, 159, 160, 319]].double(), expected, atol=1e-6, rtol=0)


def test_samples_of_a_batch_do_not_influence_each_other():
    network, x, text, t = make(SMALL), draw(3, 4, 8, 8), draw(3, 77, 48, seed=2), torch.tensor([999, 40, 1])
    together = network(x, t, text)
    for i in range(3):
        torch.testing.assert_close(network(x[i : i + 1], t[i : i + 1], text[i : i + 1]), together[i : i + 1])


def test_timestep_text_and_sizes_all_reach_the_output():
    network, x, text, t = make(SMALL_SDXL_UNET), draw(1, 4, 8, 8), draw(1, 77, 192, seed=2), torch.tensor([500])
    pooled, sizes = draw(1, 96, seed=3), torch.tensor([[512, 512, 0, 0, 512, 512]])
    base = network(x, t, text, pooled, sizes)
    for changed in (
        (x, t + 1, text, pooled, sizes),
        (x, t, text.flip(2), pooled, sizes),
        (x, t, text, pooled + 0.1, sizes),
        (x, t, text, pooled, sizes + 100),
    ):
        assert (network(*changed) - base).abs().max() > 1e-4


def test_gradients_reach_every_parameter():
    network = make(SMALL).requires_grad_(True)
    network(draw(1, 4, 16, 16), torch.tensor([500]), draw(1, 77, 48, seed=2)).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in network.parameters())


def test_sdxl_without_its_extra_conditions_is_an_error():
    with pytest.raises(ValueError, match="needs pooled and time_ids"):
        make(SMALL_SDXL_UNET)(draw(1, 4, 8, 8), torch.tensor([1]), draw(1, 77, 192))
