"""Small models that many tests share, made once: nothing may change them. The `_copy` ones are there to be changed."""

import os
import shutil

import helpers
import pytest
import torch

from support.inception import Inception

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the reference libraries are imported, where they are used


@pytest.fixture(scope="session")
def sd15_pipeline(tmp_path_factory):
    return helpers.sd15_pipeline(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="session")
def sdxl_pipeline(tmp_path_factory):
    return helpers.sdxl_pipeline(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="session")
def sd15(sd15_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd15"
    sd15_pipeline.save_pretrained(folder)  # as today's libraries write it
    return folder


@pytest.fixture(scope="session")
def sdxl(sdxl_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    sdxl_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def sd15_copy(sd15, tmp_path):
    return shutil.copytree(sd15, tmp_path / "model")


@pytest.fixture
def sdxl_copy(sdxl, tmp_path):
    return shutil.copytree(sdxl, tmp_path / "model")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return helpers.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "clip")


@pytest.fixture(scope="session")
def inception():
    """The FID network with random weights; their scale is such that every layer's output varies about as much as its
    input."""
    network = helpers.randomize(Inception(), 0)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.2 + 0.6 * torch.rand(buffer.shape, generator=generator))
    return network


@pytest.fixture(scope="session")
def inception_file(inception, tmp_path_factory):
    """That network's file as its publisher makes it: a plain state dict."""
    file = tmp_path_factory.mktemp("fid") / "inception.pth"
    torch.save(inception.state_dict(), file)
    return file
