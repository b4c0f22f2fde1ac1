"""Our networks are those of diffusers and transformers: the same tensors, and the same numbers come out."""

import parity
import pytest
import torch
from helpers import TEXT, TEXT_2, UNET, UNET_XL, VAE

from model import NETWORKS
from support.layouts import PREFIXES, sources_in_folder
from support.official import OFFICIAL
from support.weights import build, read_config
from unet import UNet, UNetConfig


@pytest.mark.slow
@pytest.mark.parametrize("family, part", [(family, part) for family in OFFICIAL for part in PREFIXES[family]])
def test_names_and_shapes_of_all_tensors_are_the_official_ones(family, part):
    settings = OFFICIAL[family][part]
    ours = build(NETWORKS[part][0], read_config(NETWORKS[part][1], settings, part)).state_dict()
    with torch.device("meta"):
        theirs = parity.empty_reference(settings).state_dict()
    sources = sources_in_folder(ours, theirs.keys())
    assert {sources[name][0]: w.shape for name, w in ours.items()} == {name: w.shape for name, w in theirs.items()}


SMALL = {
    "SD1.5's UNet": lambda: parity.run_unet(UNET, 16),
    "SD1.5's UNet, odd size": lambda: parity.run_unet(UNET, 13),
    "SDXL's UNet": lambda: parity.run_unet(UNET_XL, 16),
    "encoder": lambda: parity.run_vae(VAE, "encode"),
    "decoder": lambda: parity.run_vae(VAE, "decode"),
    "CLIP ViT-L": lambda: parity.run_text(TEXT),
    "CLIP bigG": lambda: parity.run_text(TEXT_2),
}


@pytest.mark.parametrize("network", SMALL)
def test_a_network_equals_the_reference(network):
    assert parity.error_of(SMALL[network]) < 1e-4


def test_sdxl_without_its_extra_conditions_is_an_error():
    with torch.device("meta"), pytest.raises(ValueError, match="needs pooled and time_ids"):
        UNet(read_config(UNetConfig, UNET_XL, "unet"))(torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 77, 80))


def test_the_comparison_notices_a_single_wrong_number():
    def run():
        ours, theirs = parity.run_text(TEXT)
        return ours + 2e-4 * theirs.abs().max() * (torch.arange(len(ours)) == 7), theirs

    assert parity.error_of(run) > 1e-4
