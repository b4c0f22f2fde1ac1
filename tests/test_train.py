"""The trainer: what one update computes, what a stage learns from, and what comes out of it."""

import json
import math
import shutil
import signal
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import ONE_THREAD, randomize, refusal, same
from PIL import Image

import data
import reflow
import sample
import train
from model import StableDiffusion
from paper import variants
from support import datasets
from support.images import image_grid
from support.latents import write_latents
from support.weights import build
from unet import ResnetBlock, UNet

CPU = torch.device("cpu")
SHORT = ["--device", "cpu", "--batch-size", 2, "--warmup", 1, "--sample-every", 0]
slow = pytest.mark.slow
PERFLOW = {"_class_name": "PeRFlowScheduler", "num_time_windows": 8}


def run(*arguments):
    """The trainer within this process, which is faster than a new one: its exit code."""
    child_ended = signal.getsignal(signal.SIGCHLD)
    try:
        return helpers.exit_code(variants, *SHORT, *arguments)
    finally:
        signal.signal(signal.SIGCHLD, child_ended)


def log_of(folder):
    """The lines of a run's log.jsonl but for the one that is being written."""
    file = folder / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def state_of(folder):
    return torch.load(sorted(folder.glob("step-*.pt"))[-1], weights_only=True)


def draw(size, windows=8):
    """The first batch of training on scenes."""
    samples = data.Samples(datasets.Scenes(0), 0, (4, 8, 8), windows)
    return next(iter(data.batches(samples, 0, 1, size, 0, 1, 0)))


def settings(**given):
    """What `train.arguments` and `train.settle` would make of a stage's command."""
    return SimpleNamespace(**{"windows": 8, "solver_steps": 4, "alpha": 0.7, "grad_accum_steps": 1} | given)


def loss_of(student, teacher, items, args, trajectory=train.teacher_trajectory):
    batch = data.prepare(teacher, items, teacher.device)
    with torch.no_grad():
        path = trajectory(teacher, batch, args)
    return train.compute_loss(student, teacher, batch, path, args.windows, args.alpha)


# ---- one update ----


def loss_by_hand(teacher, student, items, args, guidance=1):
    """The method in plain words: one sample at a time, one number at a time."""
    abar, windows, steps = teacher.alphas_cumprod.double().tolist(), args.windows, args.solver_steps
    index = 0 if "_class_name" in teacher.configs["scheduler"] and teacher.windows else 1  # PeRFlow's is tau itself
    squares, misaligned = [], []
    for i, caption in enumerate(items["caption"]):
        text, pooled = teacher.encode_prompt(["" if items["uncond"][i] else caption])
        time_ids = None if pooled is None else torch.tensor([[64, 64, 0, 0, 64, 64]])
        conditions, uncond = (text, pooled, time_ids), (*teacher.encode_prompt([""]), time_ids)
        mean, log_variance = teacher.vae.encode(items["image"][i : i + 1])
        z_0 = teacher.vae.cfg.scaling_factor * (mean + (log_variance / 2).exp() * items["posterior"][i])

        def a(tau):
            return abar[max(tau - 1, 0)]

        def step(start, end, z, eps):
            """To the end of a window, given the noise."""
            if teacher.prediction_type == "diff_eps":
                gamma = math.sqrt(a(start) / a(end))
                return z / gamma - math.sqrt(1 - gamma**2) / gamma * eps
            image = (z - math.sqrt(1 - a(start)) * eps) / math.sqrt(a(start))
            return math.sqrt(a(end)) * image + math.sqrt(1 - a(end)) * eps

        tau = int(items["tau"][i])
        j = math.ceil(tau * windows / 1000)
        t_s, t_e = 1000 * j // windows, 1000 * (j - 1) // windows
        z = z_s = math.sqrt(a(t_s)) * z_0 + math.sqrt(1 - a(t_s)) * items["noise"][i]
        for n in range(j * steps, (j - 1) * steps, -1):
            here, there = (round(1000 * m / (windows * steps)) for m in (n, n - 1))
            eps, eps_uncond = (teacher.unet(z, torch.tensor([here - index]), *c) for c in (conditions, uncond))
            z = step(here, there, z, guidance * eps + (1 - guidance) * eps_uncond)
        v = (z - z_s) / ((t_e - t_s) / 1000)
        z_t = z_s + (tau - t_s) / 1000 * v
        eps = student(z_t, torch.tensor([tau - index]), *conditions)
        lam, eta = (float(step(t_s, t_e, *torch.tensor(pair))) for pair in ([1.0, 0.0], [0.0, 1.0]))
        r = (t_s - tau) / (t_s - t_e)
        v_pred = ((lam - 1) * z_t + eta * eps) / ((t_e - t_s) / 1000 * (1 - r + r * lam))
        squares.append((v_pred - v).square().mean().item())
        misaligned.append(1 - ((v_pred * v).sum() / v_pred.norm() / v.norm()).item())
    return np.mean(squares) + args.alpha * np.mean(misaligned), np.mean(squares), np.mean(misaligned)


@torch.no_grad()
def compare_with_hand(sd, scheduler, args, trajectory=train.teacher_trajectory, guidance=1):
    teacher, student = StableDiffusion.load(sd), randomize(StableDiffusion.load(sd).unet, 9)
    teacher.configs["scheduler"] = teacher.configs["scheduler"] | scheduler
    items = draw(4, args.windows)
    items["uncond"][1] = True
    assert len(set(reflow.window_of(items["tau"], args.windows)[0].tolist())) >= 3
    loss, parts = loss_of(student, teacher, items, args, trajectory)
    expected = loss_by_hand(teacher, student, items, args, guidance)
    assert [x.item() for x in (loss, parts["mse"], parts["cos"])] == pytest.approx(expected, rel=1e-5)


KINDS = {
    "diffusion model": ("sd15", {}, 8, 4),
    "SDXL": ("sdxl", {}, 8, 4),
    "flow in PeRFlow's form": ("sd15", PERFLOW | {"prediction_type": "diff_eps"}, 4, 2),
    "flow of PeRFlow's SDXL": ("sd15", PERFLOW | {"prediction_type": "ddim_eps"}, 4, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_method_worked_out_by_hand(request, kind):
    model, scheduler, windows, steps = KINDS[kind]
    args = settings(windows=windows, solver_steps=steps)
    compare_with_hand(request.getfixturevalue(model), scheduler, args)


def one_update(base, out, *arguments, processes=1):
    """The log line and the gradients, as Adam's first moments, of one update from a batch of 4."""
    arguments = [*SHORT, "--stage", 1, "--model", base, "--iters", 1, "--out", out, *arguments]
    if processes == 1:
        assert run(*arguments) == 0
    else:
        command = helpers.command(variants, *arguments, processes=processes)
        done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    moments = state_of(out / "stage-1-run")["optimizer"]["state"]
    return log_of(out / "stage-1-run")[0], [moments[i]["exp_avg"] for i in sorted(moments)]


@pytest.fixture(scope="module")
def update_of_4(sd15, tmp_path_factory):
    return one_update(sd15, tmp_path_factory.mktemp("update"), "--batch-size", 4)


@slow
@pytest.mark.parametrize(
    "arguments, processes",
    [
        (["--batch-size", 2, "--accumulate", 2], 1),
        (["--batch-size", 4, "--recompute"], 1),
        (["--batch-size", 1, "--accumulate", 2], 2),
    ],
    ids=["two parts", "recomputed activations", "two processes with two parts"],
)
def test_a_batch_gives_the_same_gradient_however_it_is_computed(sd15, tmp_path, update_of_4, arguments, processes):
    line, gradient = one_update(sd15, tmp_path, *arguments, processes=processes)
    expected_line, expected = update_of_4
    for name in "loss", "mse", "cos", "grad_norm":  # grad_norm is that before clipping, which hides a wrong scale
        assert line[name] == pytest.approx(expected_line[name], rel=1e-4)
    assert len(gradient) == len(expected)
    assert sum(theirs.abs().max() > 1e-6 for theirs in expected) == len(expected) - 2
    for ours, theirs in zip(gradient, expected):  # those two: attention within a single pixel, which is always 1
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-10


@slow
def test_recomputing_runs_each_block_again_on_the_way_back(sd15):
    teacher, student, calls = StableDiffusion.load(sd15), StableDiffusion.load(sd15).unet.requires_grad_(True), []
    train.checkpoint_activations(student)
    blocks = [module for module in student.modules() if isinstance(module, ResnetBlock)]
    for block in blocks:
        block.conv1.register_forward_pre_hook(lambda *_: calls.append(1))
    loss_of(student, teacher, draw(1), settings(solver_steps=1))[0].backward()
    assert len(calls) == 2 * len(blocks)


def test_the_learning_rate_rises_stays_and_falls():
    args = SimpleNamespace(iters=100, lr=2.0, warmup=10, cooldown=0.5)
    rates = [train.learning_rate(step, args) for step in (0, 4, 9, 10, 50, 75, 99)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.04])
    constant = SimpleNamespace(iters=100, lr=2.0, warmup=0, cooldown=0.0)
    assert [train.learning_rate(step, constant) for step in (0, 50, 99)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("step, kept", [(8, 0.5), (1000, 0.95)])
def test_a_young_average_forgets_faster(step, kept):
    ema, network = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [kept * a + (1 - kept) * b for a, b in zip(ema.parameters(), network.parameters())]
    train.update_ema(ema, network, step, decay=0.95)
    for ours, theirs in zip(ema.parameters(), expected):
        torch.testing.assert_close(ours, theirs)


def test_cached_latents_stand_for_their_images(sd15):
    sd, items = StableDiffusion.load(sd15), draw(2)
    expected = data.prepare(sd, dict(items), CPU)
    mean, log_variance = sd.vae.encode(items.pop("image"))
    ours = data.prepare(sd, items | {"mean": mean, "log_variance": log_variance}, CPU)
    for name in "z_0", "noise", "tau":
        assert torch.equal(ours[name], expected[name])


# ---- stages and baselines ----

DIFFUSION = SimpleNamespace(windows=None)
EIGHT = SimpleNamespace(windows=8)


@pytest.mark.parametrize(
    "teacher, windows, steps",
    [(DIFFUSION, 8, 4), (DIFFUSION, 3, 11), (DIFFUSION, 1, 32), (DIFFUSION, 64, 1), (EIGHT, 4, 2), (EIGHT, 1, 8)],
)
def test_a_window_gets_its_share_of_32_ddim_steps_or_a_step_for_each_window_it_merges(teacher, windows, steps):
    assert train.solver_steps(teacher, windows) == steps
    assert train.solver_steps(teacher, windows, 2 * steps) == 2 * steps
    if teacher.windows:  # a step across a boundary of the teacher's windows would be no step of its trajectory
        assert f"a multiple of {steps}" in refusal(train.solver_steps, teacher, windows, 2 * steps + 1)
    assert f"at most {1000 // windows}" in refusal(train.solver_steps, teacher, windows, 1000 // windows + 1)


def test_windows_that_cannot_be_merged_are_refused_with_those_that_can():
    for windows in 3, 8, 16:
        expected = f"the teacher, a flow of 8 windows, merges into 1, 2, 4 of them, not {windows}"
        assert refusal(train.solver_steps, EIGHT, windows) == expected


@slow
def test_the_baseline_learns_from_a_diffusion_model_in_one_stage(sd15, tmp_path, monkeypatch):
    grids, ddim = [], reflow.ddim
    monkeypatch.setattr(reflow, "ddim", lambda eps, z, abar, grid: grids.append(grid) or ddim(eps, z, abar, grid))
    arguments = ["--stage", 2, "--teacher", sd15, "--alpha", 0, "--iters", 1, "--name", "baseline", "--out", tmp_path]
    assert run(*arguments) == 0
    assert len(grids) == 1 and len(grids[0]) == 8 + 1 and (grids[0][0] - grids[0][-1] == 250).all()
    (line,) = log_of(tmp_path / "baseline-run")
    assert line["loss"] == line["mse"] and line["cos"] > 0
    assert StableDiffusion.load(tmp_path / "baseline").windows == 4


@pytest.fixture(scope="module")
def stages(sd15, tmp_path_factory):
    """A folder with a diffusion model, base, and its first two stages; and what was in base before."""
    out = tmp_path_factory.mktemp("stages")
    base = shutil.copytree(sd15, out / "base")
    before = {file.relative_to(base): file.read_bytes() for file in sorted(base.rglob("*")) if file.is_file()}
    assert run("--stage", 1, "--model", base, "--iters", 2, "--lr", 0.01, "--sample-every", 2, "--out", out) == 0
    assert run("--stage", 2, "--iters", 1, "--lr", 0.01, "--out", out) == 0
    return out, before


@slow
def test_a_stage_makes_a_flow_of_its_average_with_all_other_files_of_its_base(stages):
    out, before = stages
    flow, base, state = StableDiffusion.load(out / "stage-1", dtype=None), out / "base", state_of(out / "stage-1-run")
    assert (flow.windows, flow.prediction_type, StableDiffusion.load(out / "stage-2").windows) == (8, "ddim_eps", 4)
    weights = flow.unet.state_dict()
    assert same(weights, {name: weight.half() for name, weight in state["ema"].items()})
    assert {weight.dtype for part in ("ema", "student") for weight in state[part].values()} == {torch.float32}
    assert not any(torch.equal(weight, state["student"][name].half()) for name, weight in weights.items())
    assert {path: (base / path).read_bytes() for path in before} == before
    for stage in "stage-1", "stage-2":
        files = {file.relative_to(out / stage) for file in (out / stage).rglob("*") if file.is_file()}
        assert files == before.keys()


@slow
def test_a_line_of_the_log_is_that_of_an_update(stages):
    out, _ = stages
    lines = log_of(out / "stage-1-run")
    assert [(line["step"], line["lr"], line["left_out"]) for line in lines] == [(1, 0.01, 0), (2, 0.01, 0)]
    names = {"step", "loss", "mse", "cos", "grad_norm", "lr", "left_out", "seconds"}
    for line in lines:
        assert line.keys() == names and min(line[name] for name in names - {"left_out"}) > 0
        assert line["loss"] == pytest.approx(line["mse"] + 0.1 * line["cos"], rel=1e-4)


@slow
def test_a_sheet_shows_what_the_average_draws(stages):
    out, _ = stages
    (file,) = (out / "stage-1-run").glob("*.p*g")
    prompts = train.read_prompts(train.PROMPTS)[:16]
    images = sample.generate(StableDiffusion.load(out / "stage-1"), prompts, 8, 4.0)
    expected = np.array(image_grid(list(images), prompts, 8)).astype(int)
    with Image.open(file) as sheet:  # whose weights are not yet rounded
        difference = np.abs(np.array(sheet) - expected)
    assert file.name == "sheet-0000002.png" and np.median(difference) <= 1 and difference.mean() < 2


def test_sdxl_is_given_the_sizes_of_each_image(sdxl):
    sd, sizes = StableDiffusion.load(sdxl), torch.tensor([[64, 96, 0, 16, 64, 64], [64, 128, 0, 32, 64, 64]])
    _, pooled, time_ids = data.prepare(sd, draw(2) | {"time_ids": sizes}, CPU)["conditions"]
    assert pooled.shape == (2, 48) and torch.equal(time_ids, sizes)


# ---- what is refused ----

REFUSED = {
    "--windows 4": "name a --stage, or --windows and --teacher",
    "--stage 1 --model nowhere": "the model nowhere does not exist; check the path",
    "--stage 2": "stage-1 does not exist; train stage 1 first, or name a --teacher",
    "--stage 1 --model {file}": "is a single file; make a folder of it: python -m tools.convert ",
    "--stage 1 --data {latents}": "holds latents of another VAE",
    "--stage 1 --student {sdxl}": "is not built as the teacher",
    "--stage 1 --student {perflow}": "is not built as the teacher",
    "--stage 1 --device nothing": "--device nothing cannot be used here",
    "--stage 1 --device meta": "--device meta cannot be used here",
    "--name .. --stage 1": "--name .. is not the name of a folder",
    "--name . --stage 1": "--name . is not the name of a folder",
}


@pytest.fixture(scope="module")
def places(sd15, sdxl, tmp_path_factory):
    """The folders that `REFUSED` names."""
    root = tmp_path_factory.mktemp("places")
    (root / "latents").mkdir()
    write_latents(root / "latents/a.safetensors", *torch.ones(2, 3, 4, 8, 8), ["a"] * 3)
    helpers.write(root / "latents/made_of.json", {"vae": "123"})
    shutil.copytree(sd15, root / "perflow")
    helpers.edit(root / "perflow/scheduler/scheduler_config.json", **PERFLOW, prediction_type="diff_eps")
    file = sd15 / "unet/diffusion_pytorch_model.safetensors"
    return {"latents": root / "latents", "perflow": root / "perflow", "sdxl": sdxl, "file": file}


@pytest.mark.parametrize("arguments", [pytest.param(a, marks=[slow] if "{" in a else []) for a in REFUSED])
def test_a_wrong_argument_is_one_clear_line_and_exit_code_2(sd15, places, tmp_path, capsys, arguments):
    given = [word.format(**places) for word in arguments.split()]
    model = [] if {"--model", "--teacher"} & set(given) else ["--model", sd15]
    assert run("--out", tmp_path, "--iters", 1, *model, *given) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and REFUSED[arguments] in lines[0]
    assert not (tmp_path / "stage-1").exists()


def test_the_diverged_processes_are_named(tmp_path):
    message = refusal(train.runs.report_divergence, 8, [0.0, math.nan, 1.0, math.inf], tmp_path)
    assert message.startswith("the loss of rank 1, 3 is not finite in update 8; last good checkpoint: none was written")
    assert refusal(train.runs.report_divergence, 8, [1.0], tmp_path).startswith("the gradient is not finite in")


@slow
@pytest.mark.parametrize("kind", ["SDXL", "flow of PeRFlow's SDXL"])
def test_a_device_is_waited_for_once_in_an_update(request, tmp_path, monkeypatch, kind):
    name, scheduler, windows, _ = KINDS[kind]
    folder = request.getfixturevalue(name)
    waits, teacher = [], helpers.shapes_only(folder, **scheduler)
    student, tolist = build(UNet, teacher.unet.cfg).requires_grad_(True), torch.Tensor.tolist

    def spy(numbers):
        waits.extend([numbers.device.type] if numbers.device.type == "meta" else [])
        return [0.0] * len(numbers) if numbers.device.type == "meta" else tolist(numbers)

    monkeypatch.setattr(torch.Tensor, "tolist", spy)
    monkeypatch.setattr(train.Process, "start", lambda _: train.Process(0, 1, torch.device("meta")))
    monkeypatch.setattr(train, "load_networks", lambda *_: (teacher, student))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    monkeypatch.setattr(train.runs, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(train, "save_flow", lambda *_: None)
    ours = ["--windows", windows, "--teacher-guidance", 3]
    with helpers.NoWaiting():
        assert run("--stage", 1, "--model", folder, "--iters", 1, *ours, "--out", tmp_path) == 0
    assert waits == ["meta"]
