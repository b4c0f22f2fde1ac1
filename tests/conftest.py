"""Small models that many tests share, made once: nothing may change them. The `_copy` ones are there to be changed."""

import os
import shutil

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before `helpers` imports the reference libraries, which takes seconds


@pytest.fixture(scope="session")
def sd15_pipeline(tmp_path_factory):
    import helpers

    return helpers.sd15_pipeline(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="session")
def sdxl_pipeline(tmp_path_factory):
    import helpers

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
    import helpers

    return helpers.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "clip")
