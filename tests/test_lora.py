"""Low-rank updates: what they compute, what a run with --lora trains and writes, and what diffusers makes of it."""

import copy
import json
import subprocess

import helpers
import numpy as np
import pytest
import torch
from helpers import randomize, refusal, rewrite, same
from safetensors import safe_open
from safetensors.torch import load_file
from test_in_diffusers import PROMPTS, images
from test_train import log_of, run, state_of

import sample
from model import MINIATURE, StableDiffusion
from paper import variants
from support import lora, lora_files, runs
from support.official import flow_scheduler

slow = pytest.mark.slow
SEED = 5


@pytest.fixture(params=["sd15", "sdxl"])
def sd(request):
    return StableDiffusion.load(request.getfixturevalue(request.param))


def student_of(sd, rank=3):
    """A student whose update is not zero."""
    student = lora.attach(sd.unet, rank, SEED)
    for i, (name, weight) in enumerate(student.named_parameters()):
        if "lora_B" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return student


def noise_predicted(sd, unet):
    z, tau = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1000, 300])
    return sd.epsilon(sd.conditions(PROMPTS, 64, 64), unet=unet)(z, tau)


@torch.no_grad()
def test_an_update_begins_at_nothing_and_is_the_same_as_changed_weights(sd):
    before = noise_predicted(sd, sd.unet)
    assert torch.equal(noise_predicted(sd, lora.attach(sd.unet, 3, SEED)), before)
    student = student_of(sd)
    after, copied = noise_predicted(sd, student), noise_predicted(sd, copy.deepcopy(student))
    assert (after - before).std() > 0.1 * before.std() and torch.equal(after, copied)
    merged = lora.merged(copy.deepcopy(sd.unet), student.state_dict())
    torch.testing.assert_close(noise_predicted(sd, merged), after, rtol=1e-4, atol=1e-4)
    assert torch.equal(noise_predicted(sd, sd.unet), before)


def test_only_the_update_is_trained_and_the_base_is_shared(sd):
    student = lora.attach(sd.unet, 3, SEED)
    layers = [name for name, w in sd.unet.state_dict().items() if name.endswith("weight") and w.dim() > 1]
    expected = {name.replace("weight", f"lora_{part}.weight") for name in layers for part in "AB"}
    assert student.state_dict().keys() == {name for name, _ in student.named_parameters()} == expected
    for other in student, copy.deepcopy(student):
        assert (
            other.down_blocks[0].resnets[0].conv1.shared.layer.weight is sd.unet.down_blocks[0].resnets[0].conv1.weight
        )
    assert same(student.state_dict(), lora.attach(sd.unet, 3, SEED).state_dict())
    noise_predicted(sd, student.requires_grad_(True)).square().mean().backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in student.named_parameters() if "lora_B" in name)
    assert all(weight.grad is None for weight in sd.unet.parameters())


def test_a_base_in_low_precision_has_an_update_in_full_precision(sd15):
    sd = StableDiffusion.load(sd15, dtype=torch.bfloat16)
    student = student_of(sd).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        noise_predicted(sd, student).square().mean().backward()
    assert {w.dtype for w in student.parameters()} == {w.grad.dtype for w in student.parameters()} == {torch.float32}


@slow
def test_a_compiled_student_is_one_graph_for_all_updates(sd15):
    sd, graphs = StableDiffusion.load(sd15), []
    student = student_of(sd).requires_grad_(True)
    student.compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for _ in range(2):
        noise_predicted(sd, student).square().mean().backward()
    assert len(graphs) == 1


@pytest.fixture
def file(sd, tmp_path):
    scheduler = flow_scheduler(sd, 4)
    lora_files.write(tmp_path, student_of(sd).state_dict(), scheduler, "some model")
    return tmp_path / lora_files.NAME


@slow
def test_diffusers_draws_the_same_with_the_file(request, sd, file, tmp_path):
    """Also on another model of the same build, which was not there in training."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    with safe_open(file, "pt") as tensors:
        facts = tensors.metadata()
    assert (facts["rank"], facts["scale"], facts["num_time_windows"], facts["base"]) == ("3", "1", "4", "some model")
    randomize(sd.unet, 8)
    sd.save(tmp_path / "other")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "other")
    update, facts = lora_files.read(file, sd.unet)
    before = sample.generate(sd, PROMPTS, 4, 3.0, SEED)
    lora.merged(sd.unet, update, facts["scale"])
    sd.configs["scheduler"] = facts["scheduler"]
    wanted = sample.generate(sd, PROMPTS, 4, 3.0, SEED)
    assert np.abs(wanted.astype(int) - before).mean() > 5
    pipeline.load_lora_weights(file.parent)
    settings = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}  # as docs/ has it
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    assert np.abs(wanted / 255 - images(pipeline, 4, 3.0)).max() < 1.01 / 255


def without(name):
    return lambda tensors: {key: weight for key, weight in tensors.items() if name not in key}


def narrower(name):
    return lambda tensors: {key: w[:, :1].clone() if name in key else w for key, w in tensors.items()}


REFUSED = {
    "of the text encoder": (lambda t: t | {"text_encoder.a": torch.ones(1)}, "holds text_encoder.a; only"),
    "of kohya's tools": (lambda t: {"lora_unet_conv_in.lora_down.weight": torch.ones(1)}, "only updates of the UNet"),
    "with nothing": (lambda t: {}, "holds nothing"),
    "with a half missing": (without("conv_in.lora_B"), "of another build of UNet: see conv_in"),
    "of another width": (narrower("conv_in.lora_A"), "of another build of UNet: see conv_in"),
    "of more layers": (lambda t: t | {"unet.x.lora_A.weight": torch.ones(1, 1)}, "of another build of UNet: see x"),
    "without settings": (lambda t: t, "does not say which flow it makes"),  # rewritten without its metadata
}  # fmt: skip


def test_a_file_that_does_not_fit_is_refused_by_name(file, sd):
    written = file.read_bytes()
    for kind, (change, message) in REFUSED.items():
        file.write_bytes(written)
        rewrite(file, change)
        assert message in refusal(lora_files.read, file, sd.unet), kind


@pytest.mark.parametrize("damage, message", [(b"", "damaged"), (None, "does not exist")])
def test_a_file_that_cannot_be_read_is_refused(file, sd, damage, message):
    file.unlink() if damage is None else file.write_bytes(damage)
    assert message in refusal(lora_files.read, file, sd.unet)


# ---- runs of train.py and sample.py ----


@pytest.fixture(scope="module")
def stages(sd15, tmp_path_factory):
    """Two stages of rank 2, and the first again without gradient checkpointing and in two parts."""
    out = tmp_path_factory.mktemp("stages")
    common = ["--model", sd15, "--lora", 2, "--lr", 0.01, "--cooldown", 0, "--out", out]
    assert run("--stage", 1, *common, "--iters", 2, "--recompute", "--save-every", 1) == 0
    assert run("--stage", 2, *common, "--iters", 1) == 0
    return out


@slow
def test_a_stage_writes_a_folder_and_an_update_of_the_base_that_are_one_flow(sd15, stages):
    base = StableDiffusion.load(sd15)
    for name, windows in ("stage-1", 8), ("stage-2", 4):
        flow = StableDiffusion.load(stages / name)
        update, facts = lora_files.read(stages / name, base.unet)
        merged = lora.merged(copy.deepcopy(base.unet), update).state_dict()
        assert flow.windows == facts["scheduler"]["num_time_windows"] == windows
        assert facts["base"] == runs.weights_in(sd15) and not same(merged, base.unet.state_dict())
        for key, weight in flow.unet.state_dict().items():
            torch.testing.assert_close(weight, merged[key], rtol=1e-3, atol=1e-4)
    state = state_of(stages / "stage-1-run")
    assert state["student"].keys() == state["ema"].keys() == update.keys()
    assert len(state["optimizer"]["state"]) == len(update)


@slow
def test_the_second_stage_begins_where_the_first_one_ended(sd15, stages, tmp_path):
    """Its teacher is that flow; its student has one window for two, and its loss is that of a full student."""
    assert run("--stage", 2, "--teacher", stages / "stage-1", "--iters", 1, "--out", tmp_path) == 0
    ours, full = (log_of(out / "stage-2-run")[0] for out in (stages, tmp_path))
    assert ours["loss"] == pytest.approx(full["loss"], rel=5e-3)


@slow
@pytest.mark.parametrize("how", [["--batch-size", 1, "--accumulate", 2], "resumed", "two processes"])
def test_a_run_gives_the_same_weights_however_it_is_computed(sd15, stages, tmp_path, how):
    command = ["--stage", 1, "--model", sd15, "--lora", 2, "--lr", 0.01, "--cooldown", 0, "--out", tmp_path]
    if how == "two processes":
        arguments = ["--sample-every", 0, "--warmup", 1, "--batch-size", 1, "--device", "cpu", "--iters", 2]
        line = helpers.command(variants, *command, *arguments, processes=2)
        assert subprocess.run(line, env=helpers.ONE_THREAD).returncode == 0
    elif how == "resumed":
        assert run(*command, "--iters", 1) == 0 and run(*command, "--iters", 2, "--resume") == 0
    else:
        assert run(*command, *how, "--iters", 2) == 0
    ours, expected = (load_file(out / "stage-1" / lora_files.NAME) for out in (tmp_path, stages))
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-2, atol=2e-4)
    assert how != "resumed" or same(ours, expected)


@slow
def test_stages_have_one_base_and_one_rank(sd15, sd15_copy, stages, tmp_path, capsys):
    def refused(*arguments):
        assert run("--iters", 1, "--out", tmp_path, *arguments) == 2
        return capsys.readouterr().err

    second = ["--stage", 2, "--teacher", stages / "stage-1"]
    assert "is of rank 2, not 3; all stages have the same --lora" in refused(*second, "--model", sd15, "--lora", 3)
    assert "is an update of another build of UNet" in refused(*second, "--model", MINIATURE, "--lora", 2)
    rewrite(sd15_copy / "unet/diffusion_pytorch_model.safetensors", lambda t: {name: 2 * w for name, w in t.items()})
    message = f"was not trained on {sd15_copy}; name the model that it was trained on: --model"
    assert message in refused(*second, "--model", sd15_copy, "--lora", 2)
    student = ["--stage", 1, "--model", sd15, "--student", stages / "stage-1", "--lora", 2]
    assert "leave --student out" in refused(*student)


@slow
def test_sample_draws_with_a_file_what_the_folder_draws(sd15, stages, tmp_path):
    for name, model in ("a", ["--model", sd15, "--lora", stages / "stage-2"]), ("b", ["--model", stages / "stage-2"]):
        assert helpers.exit_code(sample, "--prompt", "a red cat", *model, "--out", tmp_path / name) == 0
    ours, wanted = (np.array(helpers.Image.open(tmp_path / name / "00000.png")).astype(int) for name in "ab")
    assert np.abs(ours - wanted).max() <= 1
    assert json.loads(safe_open(stages / "stage-2" / lora_files.NAME, "pt").metadata()["scheduler"])
