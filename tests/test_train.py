"""The trainer: what a stage learns from, that interruptions leave no trace, and what comes out of it."""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import ONE_THREAD, edit, exit_code, randomize, read, refusal, write_shard
from PIL import Image
from safetensors.torch import load_file

import data
import reflow
import sample
import train
from model import StableDiffusion, flow_scheduler, guided_epsilon
from support.images import image_grid
from support.runs import load_checkpoint
from support.streams import draw_noise
from support.weights import build
from unet import ResnetBlock, UNet
from vae import VAE

ROOT = Path(train.__file__).parent
SHORT = ["--device", "cpu", "--batch-size", 2, "--points", 1, "--warmup", 1, "--log-every", 1, "--sample-every", 0]


def command(*arguments, processes=1):
    """train.py as a user starts it."""
    return helpers.command(train, *SHORT, *arguments, processes=processes)


def run(*arguments):
    """The same within this process, which is faster: the exit code of train.main()."""
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        return exit_code(train, *SHORT, *arguments)
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture
def start():
    """Start train.py in the background; it does not outlive the test."""
    started = []

    def start(*arguments, processes=1):
        line = command(*arguments, processes=processes)
        started.append(subprocess.Popen(line, env=ONE_THREAD, start_new_session=True, **PIPES))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def log_of(folder):
    """The lines of a run's log.jsonl but for the one that is being written."""
    file = folder / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_until_logged(process, folder, step):
    deadline = time.time() + 120
    while not any(line["step"] >= step for line in log_of(folder)):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)


def state_of(folder):
    return torch.load(sorted(folder.glob("step-???????"))[-1] / "state.pt", weights_only=True)


def identical(a, b):
    """Are these parts of a state.pt the same, bit for bit?"""
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


# ---- interruptions ----


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(sd15, tmp_path, start):
    arguments = ["--stage", 1, "--model", sd15, "--iters", 16, "--save-every", 4]
    whole = start(*arguments, "--out", tmp_path / "whole")
    arguments += ["--out", tmp_path / "killed"]
    killed, folder = start(*arguments), tmp_path / "killed/stage-1-run"
    wait_until_logged(killed, folder, 5)  # one step past the first checkpoint
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed/stage-1").exists()
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"loss": 0.1')  # as if it had been hit while writing this line
    for process in start(*arguments, "--resume"), whole:
        _, error = process.communicate()
        assert process.returncode == 0, error

    runs = [tmp_path / name / "stage-1-run" for name in ("whole", "killed")]
    (state, expected), (log, expected_log) = map(state_of, runs), map(log_of, runs)
    assert state["step"] == expected["step"] == 16 and state["student"].keys() == expected["student"].keys()
    for name in "student", "average":
        assert identical(state[name], expected[name])
    assert identical(state["optimizer"]["state"], expected["optimizer"]["state"])
    weights = [tmp_path / name / "stage-1/unet/diffusion_pytorch_model.safetensors" for name in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for lines in log, expected_log:
        assert [line["step"] for line in lines] == list(range(1, 17))
        assert all(line.pop("evaluations_per_second") > 0 for line in lines)
    assert log == expected_log


def test_ctrl_c_saves_the_step_at_hand_and_resuming_finishes(sd15, tmp_path, start):
    arguments = ["--stage", 1, "--model", sd15, "--iters", 14, "--save-every", 100, "--out", tmp_path]
    process, folder = start(*arguments), tmp_path / "stage-1-run"
    wait_until_logged(process, folder, 1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == "stopped; the same command with --resume goes on from the last checkpoint"
    step = log_of(folder)[-1]["step"]
    assert step < 14 and [path.name for path in folder.glob("step-*")] == [f"step-{step:07d}"]
    assert state_of(folder)["step"] == step
    assert run(*arguments, "--resume") == 0
    assert StableDiffusion.load(tmp_path / "stage-1").windows == 8


def test_a_sigterm_that_reaches_the_readers_of_data_too_saves_as_well(sd15, tmp_path, start):
    """A queueing system signals all processes of a job."""
    arguments = ["--stage", 1, "--model", sd15, "--iters", 500, "--save-every", 1000, "--out", tmp_path]
    process, folder = start(*arguments, "--workers", 1), tmp_path / "stage-1-run"
    wait_until_logged(process, folder, 1)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error.splitlines()[-2:]
    assert state_of(folder)["step"] == log_of(folder)[-1]["step"]


@pytest.mark.parametrize("owner, function, step", [(Path, "rename", 2), (os, "rmdir", 4)])
def test_a_kill_while_a_checkpoint_moves_into_place_leaves_one_to_go_on_from(
    tmp_path, monkeypatch, owner, function, step
):
    def kill(*_, **__):
        raise KeyboardInterrupt

    parts = {"student": torch.nn.Linear(2, 2)}
    train.save_checkpoint(tmp_path, 2, parts, {})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, function, kill)
        train.save_checkpoint(tmp_path, 4, parts, {})
    assert load_checkpoint(tmp_path, parts, {}, torch.device("cpu")) == step


def test_only_the_newest_checkpoint_is_kept(tmp_path):
    parts = {"student": torch.nn.Linear(2, 2)}
    for step in 9, 10, 11:
        train.save_checkpoint(tmp_path, step, parts, {"lr": "1"})
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000011"]


# ---- divergence ----


@pytest.fixture(scope="module")
def diverged(sd15, tmp_path_factory):
    out = tmp_path_factory.mktemp("diverged")
    arguments = ["--stage", 1, "--model", sd15, "--iters", 4, "--save-every", 1, "--lr", 1e10, "--out", out]
    return subprocess.run(command(*arguments), env=ONE_THREAD, **PIPES), out / "stage-1-run"


def test_divergence_names_step_rank_and_a_checkpoint_with_finite_weights(diverged):
    done, folder = diverged
    assert done.returncode == 2 and "Traceback" not in done.stderr
    good = folder / "step-0000001"
    message = f"the loss of rank 0 is not finite in update 2; last good checkpoint: {good}. Try a lower --lr\n"
    assert message in done.stderr and list(folder.glob("step-*")) == [good]
    state = state_of(folder)
    for weights in state["student"], state["average"]:
        assert all(weight.isfinite().all() for weight in weights.values())


def test_the_message_of_divergence_is_the_last_line_and_stands_alone(diverged):
    done, _ = diverged
    assert re.split("[\r\n]+", done.stderr.strip())[-1].startswith("error: ")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_diverged_process_is_named(tmp_path, loss):
    others = SimpleNamespace(rank=2, world=4, device="cpu", mean=lambda numbers: numbers / 4)
    message = refusal(train.report_divergence, 7, torch.tensor(loss), others, tmp_path)
    assert message.startswith(
        "the loss of rank 2 is not finite in update 8; last good checkpoint: none was written yet"
    )


def test_a_gradient_can_diverge_where_the_loss_does_not(tmp_path):
    alone = SimpleNamespace(rank=0, world=1, device="cpu", mean=lambda numbers: numbers)
    message = refusal(train.report_divergence, 7, torch.tensor(1.0), alone, tmp_path)
    assert message.startswith("the gradient is not finite in update 8")


# ---- one update ----


def one_update(base, out, *arguments, processes=1):
    """The log line and the gradients, as Adam's first moments, of one update from a batch of 4."""
    arguments = ["--stage", 1, "--model", base, "--iters", 1, "--out", out, *arguments]
    if processes == 1:
        assert run(*arguments) == 0
    else:
        done = subprocess.run(command(*arguments, processes=processes), env=ONE_THREAD, **PIPES)
        assert done.returncode == 0, done.stderr
    moments = state_of(out / "stage-1-run")["optimizer"]["state"]
    return log_of(out / "stage-1-run")[0], [moments[i]["exp_avg"] for i in sorted(moments)]


@pytest.fixture(scope="module")
def update_of_4(sd15, tmp_path_factory):
    return one_update(sd15, tmp_path_factory.mktemp("update"), "--batch-size", 4)


@pytest.mark.parametrize(
    "arguments, processes",
    [
        (["--batch-size", 2], 2),
        (["--batch-size", 2, "--accumulate", 2], 1),
        (["--batch-size", 1, "--accumulate", 2], 2),
        (["--batch-size", 4, "--recompute"], 1),
    ],
    ids=["two processes", "two parts", "two processes with two parts", "recomputed activations"],
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


def test_recomputing_runs_each_block_again_on_the_way_back(sd15):
    counts = []
    for recomputed in False, True:
        teacher, student = StableDiffusion.load(sd15), StableDiffusion.load(sd15).unet.requires_grad_(True)
        if recomputed:
            train.recompute_activations(student)
        calls = []
        for module in student.modules():
            if isinstance(module, ResnetBlock):
                module.conv1.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        loss, _ = train.loss_of(student, teacher, train.prepare(teacher, draw(1, 1), CPU), 8, 1, 0.1)
        loss.backward()
        counts.append(len(calls))
    assert counts[0] > 0 and counts[1] == 2 * counts[0]


def test_the_learning_rate_rises_stays_and_falls():
    args = SimpleNamespace(iters=100, lr=2.0, warmup=10, cooldown=0.5)
    rates = [train.learning_rate(step, args) for step in (0, 4, 9, 10, 50, 75, 99)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.04])
    constant = SimpleNamespace(iters=100, lr=2.0, warmup=0, cooldown=0.0)
    assert [train.learning_rate(step, constant) for step in (0, 50, 99)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("step, kept", [(0, 0.1), (8, 0.5), (80, 0.9), (1000, 0.95)])
def test_a_young_average_forgets_faster(step, kept):
    average, network = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [kept * a + (1 - kept) * b for a, b in zip(average.parameters(), network.parameters())]
    train.update_average(average, network, step, decay=0.95)
    for ours, theirs in zip(average.parameters(), expected):
        torch.testing.assert_close(ours, theirs)


# ---- what is learned ----

CPU = torch.device("cpu")
FLOW = {"_class_name": "PeRFlowScheduler", "num_time_windows": 8}


def draw(size, points, windows=8):
    """The first batch of training on scenes."""
    samples = data.Samples(data.Scenes(0), 0, (4, 8, 8), reflow.borders(windows), points)
    return next(iter(data.batches(samples, 0, 1, size, 0, 1, 0)))


def loss_by_hand(teacher, student, items, windows, steps, alpha, guidance=1):
    """The method in plain words: one sample at a time, one number at a time."""
    abar = teacher.alphas_cumprod.double().tolist()
    squares, misaligned = [], []
    for i, caption in enumerate(items["caption"]):
        text, pooled = teacher.encode_prompt(["" if items["dropped"][i] else caption])
        time_ids = None if pooled is None else torch.tensor([[64, 64, 0, 0, 64, 64]])
        conditions, unconditional = (text, pooled, time_ids), (*teacher.encode_prompt([""]), time_ids)
        mean, log_variance = teacher.vae.encode(items["image"][i : i + 1])
        z_0 = teacher.vae.cfg.scaling_factor * (mean + (log_variance / 2).exp() * items["posterior"][i])

        def a(tau):
            return abar[max(tau - 1, 0)]

        def jump(start, end, z, eps):
            """To the end of a window, given the noise."""
            if teacher.prediction_type == "diff_eps":
                gamma = math.sqrt(a(start) / a(end))
                return z / gamma - math.sqrt(1 - gamma**2) / gamma * eps
            image = (z - math.sqrt(1 - a(start)) * eps) / math.sqrt(a(start))
            return math.sqrt(a(end)) * image + math.sqrt(1 - a(end)) * eps

        first = int(items["tau"][i, 0])
        j = math.ceil(first * windows / 1000)
        t_s, t_e = 1000 * j // windows, 1000 * (j - 1) // windows
        z_s = math.sqrt(a(t_s)) * z_0 + math.sqrt(1 - a(t_s)) * items["noise"][i]
        z, fine, clock = z_s, windows * steps, 0 if teacher.windows else 1
        for n in range(j * steps, (j - 1) * steps, -1):
            here, there = round(1000 * n / fine), round(1000 * (n - 1) / fine)
            seen, seen_without = (
                teacher.unet(z, torch.tensor([here - clock]), *told) for told in (conditions, unconditional)
            )
            z = jump(here, there, z, guidance * seen + (1 - guidance) * seen_without)
        v = (z - z_s) / ((t_e - t_s) / 1000)

        for tau in items["tau"][i].tolist():
            assert t_e < tau <= t_s
            z_t = z_s + (tau - t_s) / 1000 * v
            eps = student(z_t, torch.tensor([tau]), *conditions)
            lam = float(jump(t_s, t_e, torch.tensor(1.0), torch.tensor(0.0)))
            eta = float(jump(t_s, t_e, torch.tensor(0.0), torch.tensor(1.0)))
            r = (t_s - tau) / (t_s - t_e)
            v_pred = ((lam - 1) * z_t + eta * eps) / ((t_e - t_s) / 1000 * (1 - r + r * lam))
            squares.append((v_pred - v).square().mean().item())
            misaligned.append(1 - ((v_pred * v).sum() / v_pred.norm() / v.norm()).item())
    return np.mean(squares) + alpha * np.mean(misaligned), np.mean(squares), np.mean(misaligned)


@pytest.mark.parametrize(
    "model, flow, windows, steps, guidance",
    [
        ("sd15", None, 8, 4, 1),
        ("sd15", "ddim_eps", 4, 2, 1),
        ("sd15", "diff_eps", 4, 2, 1),
        ("sdxl", None, 8, 4, 1),
        ("sd15", None, 8, 4, 3),
        ("sd15", "diff_eps", 4, 2, 3),
        ("sdxl", None, 8, 4, 3),
    ],
    ids=[
        "diffusion model", "flow", "flow in PeRFlow's form", "SDXL",
        "guided diffusion model", "guided flow", "guided SDXL",
    ],
)  # fmt: skip
@torch.no_grad()
def test_the_loss_is_that_of_the_method_worked_out_by_hand(request, model, flow, windows, steps, guidance):
    teacher = StableDiffusion.load(request.getfixturevalue(model))
    if flow:
        teacher.configs["scheduler"] |= FLOW | {"prediction_type": flow}
    student = randomize(StableDiffusion.load(request.getfixturevalue(model)).unet, 9)
    items = draw(6, 2, windows)
    items["dropped"][1] = True
    start, _ = reflow.window_of(items["tau"][:, 0], windows)
    assert len(set(start.tolist())) >= 3 and (items["tau"][:, 0] != items["tau"][:, 1]).all()
    batch = train.prepare(teacher, items, CPU)
    loss, parts = train.loss_of(student, teacher, batch, windows, steps, alpha=0.7, guidance=guidance)
    expected = loss_by_hand(teacher, student, items, windows, steps, alpha=0.7, guidance=guidance)
    assert [x.item() for x in (loss, parts["mse"], parts["cos"])] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model, flow, windows, steps", [("sd15", {}, 8, 4), ("sdxl", {}, 8, 4), ("sd15", FLOW, 4, 2)])
def test_nothing_is_read_back_from_the_device_on_the_way_to_the_gradient(request, model, flow, windows, steps):
    teacher = helpers.shapes_only(request.getfixturevalue(model), **flow)
    student = build(UNet, teacher.unet.cfg).requires_grad_(True)
    assert teacher.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        teacher.alphas_cumprod[0].item()
    items = draw(2, 2, windows)
    with helpers.NoWaiting():
        batch = train.prepare(teacher, items, teacher.device)
        walked = train.own_starts(build(UNet, teacher.unet.cfg), teacher, batch, windows, share=0.5)
        loss, _ = train.loss_of(student, teacher, batch, windows, steps, alpha=0.1, guidance=3, walked=walked)
        loss.backward()
    assert all(weight.grad is not None for weight in student.parameters())
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    torch.optim.AdamW(student.parameters()).step()
    train.update_average(build(UNet, teacher.unet.cfg), student, 0, decay=0.9)


def test_compiled_networks_are_one_graph_each_for_all_updates(sd15):
    teacher = StableDiffusion.load(sd15)
    teacher.configs["scheduler"] |= FLOW
    student, graphs = copy.deepcopy(teacher.unet).requires_grad_(True), []
    for network in teacher.unet, student:
        network.compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for _ in range(2):
        batch = train.prepare(teacher, draw(2, 1, windows=4), CPU)
        train.loss_of(student, teacher, batch, windows=4, steps=2, alpha=0.1)[0].backward()
    assert len(graphs) == 2


def test_a_device_is_waited_for_once_in_an_update(sd15, tmp_path, monkeypatch):
    waits = []

    def told(process, numbers):
        waits.append(numbers.device.type)
        return torch.zeros(numbers.shape)

    teacher = helpers.shapes_only(sd15)
    student = build(UNet, teacher.unet.cfg).requires_grad_(True)
    monkeypatch.setattr(train.sample, "choose_device", lambda _: "meta")
    monkeypatch.setattr(train, "load_networks", lambda *_: (teacher, student))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    monkeypatch.setattr(train.Process, "mean", told)
    monkeypatch.setattr(train, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(train, "save_flow", lambda *_: None)
    assert run("--stage", 1, "--model", sd15, "--iters", 1, "--windows", 32, "--out", tmp_path) == 0
    assert waits == ["meta"]


@pytest.mark.parametrize("share, own", [(0, 0), (0.5, 3), (1, 6)])
def test_a_share_of_the_paths_begins_where_the_average_leads(sd15, share, own):
    teacher, student = StableDiffusion.load(sd15), StableDiffusion.load(sd15).unet
    average = randomize(StableDiffusion.load(sd15).unet, 9)
    items, seen = draw(6, 2, windows=4), []
    teacher.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    args = SimpleNamespace(windows=4, own_starts=share, alpha=0.1, teacher_guidance=1, accumulate=1)
    train.add_gradient(student.requires_grad_(True), average, teacher, items, 8, True, args)

    batch = train.prepare(teacher, items, CPU)
    start, _ = reflow.window_of(items["tau"][:, 0], 4)
    a = reflow.along(reflow.alpha_bar(teacher.alphas_cumprod, start), batch["z_0"])
    expected = a.sqrt() * batch["z_0"] + (1 - a).sqrt() * batch["noise"]
    flow = copy.copy(teacher)
    flow.unet = average
    flow.configs = teacher.configs | {"scheduler": FLOW | {"num_time_windows": 4}}
    for i in range(own):
        caption = "" if items["dropped"][i] else items["caption"][i]
        epsilon = guided_epsilon(flow, [caption], 1, "", *items["image"].shape[2:])
        borders = [at for at in reflow.borders(4) if at >= start[i]]
        velocity = reflow.as_velocity(epsilon, teacher.alphas_cumprod, 4)
        with torch.no_grad():
            expected[i] = reflow.euler(velocity, batch["noise"][i : i + 1], torch.tensor(borders))[0]
    assert len(set(start[: max(own, 3)].tolist())) > 1
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


def test_several_points_share_one_solved_path(sd15):
    counts = {}
    for points in 1, 4:
        teacher, student = StableDiffusion.load(sd15), StableDiffusion.load(sd15).unet
        calls = {"teacher": [], "student": []}
        for name, unet in ("teacher", teacher.unet), ("student", student):
            unet.register_forward_pre_hook(lambda _, inputs, calls=calls[name]: calls.append(len(inputs[0])))
        train.loss_of(student, teacher, train.prepare(teacher, draw(2, points), CPU), 8, 4, 0.1)
        counts[points] = calls
    assert counts == {
        1: {"teacher": [2, 2, 2, 2], "student": [2]},
        4: {"teacher": [2, 2, 2, 2], "student": [8]},
    }


def test_a_dropped_caption_is_the_empty_one(sd15):
    sd, items = StableDiffusion.load(sd15), draw(3, 1)
    items["dropped"] = torch.tensor([True, False, True])
    text = train.prepare(sd, items, CPU)["text"]
    expected, _ = sd.encode_prompt(["", items["caption"][1], ""])
    assert torch.equal(text, expected) and not torch.equal(text[0], text[1])


def test_cached_latents_stand_for_their_images(sd15):
    sd, items = StableDiffusion.load(sd15), draw(2, 1)
    expected = train.prepare(sd, dict(items), CPU)
    mean, log_variance = sd.vae.encode(items.pop("image"))
    ours = train.prepare(sd, items | {"mean": mean, "log_variance": log_variance}, CPU)
    assert ours.keys() == expected.keys()
    for name in "z_0", "noise", "tau", "text":
        assert torch.equal(ours[name], expected[name])


# ---- stages and baselines ----

DIFFUSION = SimpleNamespace(windows=None)
ONE, FOUR, EIGHT = (SimpleNamespace(windows=windows) for windows in (1, 4, 8))


@pytest.mark.parametrize(
    "teacher, windows, steps",
    [(DIFFUSION, 8, 4), (DIFFUSION, 4, 8), (DIFFUSION, 1, 32), (EIGHT, 4, 2), (FOUR, 2, 2), (EIGHT, 1, 8)],
)
def test_a_window_gets_its_share_of_32_ddim_steps_or_a_step_for_each_window_it_merges(teacher, windows, steps):
    assert train.solver_steps(teacher, windows, None) == steps
    assert train.solver_steps(teacher, windows, 2 * steps) == 2 * steps
    if teacher.windows:  # a step across a border of the teacher's windows would be no step of its path
        assert f"no multiple of {steps}" in refusal(train.solver_steps, teacher, windows, 2 * steps + 1)


@pytest.mark.parametrize(
    "teacher, windows, kind",
    [
        (DIFFUSION, 3, "32 teacher steps"), (DIFFUSION, 64, "32 teacher steps"), (FOUR, 3, "a flow of 4 windows"),
        (FOUR, 4, "a flow of 4 windows"), (FOUR, 8, "a flow of 4 windows"), (ONE, 1, "a flow of 1 windows"),
    ],
)  # fmt: skip
def test_windows_that_cannot_be_merged_are_refused(teacher, windows, kind):
    message = refusal(train.solver_steps, teacher, windows, None)
    assert message.startswith(f"{kind} cannot be merged into {windows} windows; take a smaller divisor of ")


@pytest.mark.parametrize(
    "arguments, windows, steps", [(["--stage", 2], 4, 8), (["--windows", 1], 1, 32)], ids=["PeRFlow", "plain reflow"]
)
def test_baselines_learn_from_a_diffusion_model_in_one_stage(sd15, tmp_path, monkeypatch, arguments, windows, steps):
    grids = []
    ddim = reflow.ddim
    monkeypatch.setattr(reflow, "ddim", lambda eps, z, abar, grid: grids.append(grid) or ddim(eps, z, abar, grid))
    arguments = [*arguments, "--teacher", sd15, "--alpha", 0, "--iters", 1, "--batch-size", 1, "--out", tmp_path]
    assert run(*arguments, "--name", "baseline") == 0
    assert len(grids) == 1 and len(grids[0]) == steps + 1 and grids[0][0] - grids[0][-1] == 1000 // windows
    (line,) = log_of(tmp_path / "baseline-run")
    assert line["loss"] == line["mse"] and line["cos"] > 0
    assert StableDiffusion.load(tmp_path / "baseline").windows == windows


@pytest.fixture(scope="module")
def stages(sd15, tmp_path_factory):
    """A folder with a diffusion model, base, and the first two stages made of it; and what was in base before."""
    out = tmp_path_factory.mktemp("stages")
    base = shutil.copytree(sd15, out / "base")
    before = {file.relative_to(base): file.read_bytes() for file in sorted(base.rglob("*")) if file.is_file()}
    assert run("--stage", 1, "--model", base, "--iters", 2, "--lr", 0.01, "--out", out) == 0
    assert run("--stage", 2, "--iters", 1, "--lr", 0.01, "--out", out) == 0
    return out, before


def test_a_stage_makes_a_flow_of_a_diffusion_model(stages):
    out, _ = stages
    flow, base = StableDiffusion.load(out / "stage-1"), StableDiffusion.load(out / "base")
    assert (flow.windows, flow.prediction_type) == (8, "ddim_eps")
    prompts = ["the cat", "a red cat"]
    images = sample.generate(flow, prompts, 8, 2.0)
    assert images.shape == (2, 64, 64, 3)
    assert np.abs(images.astype(int) - sample.generate(base, prompts, 8, 2.0)).max() > 10
    assert "use flow" in refusal(sample.generate, flow, ["the cat"], 8, sampler="ddim")


def test_a_stage_keeps_the_average_in_half_precision(stages):
    out, _ = stages
    state = state_of(out / "stage-1-run")
    unet = StableDiffusion.load(out / "stage-1", dtype=None).unet.state_dict()
    assert all(torch.equal(weight, state["average"][name].half()) for name, weight in unet.items())
    assert not any(torch.equal(weight, state["student"][name].half()) for name, weight in unet.items())


def test_diffusers_opens_the_result_of_a_stage(stages):
    out, _ = stages
    ours = StableDiffusion.load(out / "stage-1")
    theirs = StableDiffusionPipeline.from_pretrained(out / "stage-1")
    x, t = draw_noise(0, [0, 1], (4, 8, 8)), torch.tensor([1000, 7])
    text, _ = ours.encode_prompt(["a red cat", ""])
    with torch.no_grad():
        expected = theirs.unet(x, t, text).sample
    torch.testing.assert_close(ours.unet(x, t, text), expected, rtol=1e-4, atol=1e-5)
    assert theirs.scheduler.config.num_time_windows == 8 and theirs.scheduler.config.beta_end == 0.012


def test_a_flow_whose_paths_hold_guidance_says_so_and_passes_it_on(sd15):
    diffusion = StableDiffusion.load(sd15)
    assert diffusion.guidance == 4
    flow = StableDiffusion.load(sd15)
    flow.configs["scheduler"] = flow_scheduler(diffusion, 8, guidance=2.5)
    assert flow.configs["scheduler"]["trained_guidance"] == 2.5 and flow.guidance == 1
    merged = flow_scheduler(flow, 4)
    assert (merged["num_time_windows"], merged["trained_guidance"]) == (4, 2.5)
    prompts = ["a red cat", "a cat"]
    assert np.array_equal(sample.generate(flow, prompts, 8), sample.generate(flow, prompts, 8, guidance_scale=1))
    assert not np.array_equal(sample.generate(flow, prompts, 8), sample.generate(flow, prompts, 8, guidance_scale=4))


def test_the_next_stage_merges_the_windows_of_the_one_before(stages):
    out, _ = stages
    assert StableDiffusion.load(out / "stage-2").windows == 4
    settings = read(next((out / "stage-2-run").glob("step-*")) / "settings.json")
    assert settings["teacher"] == settings["student"] == str(out / "stage-1") and settings["windows"] == "4"


def test_a_stage_shares_unchanged_files_with_its_base_and_changes_none(stages):
    out, before = stages
    assert {path: (out / "base" / path).read_bytes() for path in before} == before
    assert {file.relative_to(out / "base") for file in (out / "base").rglob("*") if file.is_file()} == before.keys()
    own = {"scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"}
    for stage in "stage-1", "stage-2":
        files = [file for file in (out / stage).rglob("*") if file.is_file()]
        assert {file.relative_to(out / stage) for file in files} == before.keys()
        for file in files:
            name = file.relative_to(out / stage)
            assert file.samefile(out / "base" / name) != (str(name) in own)


def test_the_second_stage_learns_from_two_euler_steps_of_the_first(stages, tmp_path, monkeypatch):
    out, _ = stages
    walks = []
    euler = reflow.euler
    monkeypatch.setattr(reflow, "euler", lambda v, z, grid: walks.append(grid.T.tolist()) or euler(v, z, grid))
    assert run("--stage", 2, "--teacher", out / "stage-1", "--iters", 1, "--out", tmp_path) == 0
    tau = draw(2, 1)["tau"].flatten().tolist()
    ends = [math.ceil(t / 250) * 250 for t in tau]
    assert walks == [[[end, end - 125, end - 250] for end in ends]]


def test_a_finished_run_resumes_into_the_same_result(stages, tmp_path):
    out, _ = stages
    shutil.copytree(out / "stage-1-run", tmp_path / "stage-1-run")
    arguments = ["--stage", 1, "--model", out / "base", "--iters", 2, "--lr", 0.01, "--out", tmp_path]
    assert run(*arguments, "--resume") == 0
    weights = "stage-1/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (out / weights).read_bytes()


def test_sdxl_learns_with_its_pooled_text_and_image_sizes(sdxl, tmp_path, monkeypatch):
    seen = []
    forward = UNet.forward

    def spy(self, z, tau, text, pooled, time_ids):
        seen.append((tau, pooled, time_ids))
        return forward(self, z, tau, text, pooled, time_ids)

    monkeypatch.setattr(UNet, "forward", spy)
    assert run("--stage", 1, "--model", sdxl, "--iters", 1, "--out", tmp_path) == 0
    items = draw(2, 1)
    assert items["dropped"].tolist() == [False, True]
    _, expected = StableDiffusion.load(sdxl).encode_prompt([items["caption"][0], ""])
    assert len(seen) == 5  # four of the teacher, one of the student
    for _, pooled, time_ids in seen:
        torch.testing.assert_close(pooled, expected)
        assert time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    state = state_of(tmp_path / "stage-1-run")
    weights = load_file(sdxl / "unet/diffusion_pytorch_model.safetensors")
    moved = [name for name, weight in state["student"].items() if name in weights and (weight != weights[name]).any()]
    assert any("add_embedding" in name for name in moved)
    assert StableDiffusion.load(tmp_path / "stage-1").windows == 8


def test_cached_latents_train_without_the_encoder(sd15, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    data.write_latents(tmp_path / "data/a.safetensors", torch.ones(3, 4, 8, 8), torch.zeros(3, 4, 8, 8), ["a"] * 3)
    monkeypatch.setattr(VAE, "encode", lambda *_: pytest.fail("the encoder ran"))
    assert run("--stage", 1, "--model", sd15, "--iters", 2, "--data", tmp_path / "data", "--out", tmp_path) == 0


# ---- what is written beside the result ----


def test_a_line_of_the_log_is_the_mean_since_the_last_one(sd15, tmp_path):
    arguments = ["--stage", 1, "--model", sd15, "--iters", 4, "--lr", 1e-3, "--warmup", 2]
    for every in 1, 2:
        assert run(*arguments, "--log-every", every, "--out", tmp_path / str(every)) == 0
    each, pairs = (log_of(tmp_path / str(every) / "stage-1-run") for every in (1, 2))
    names = {"loss", "mse", "cos", "grad_norm", "lr", "evaluations_per_second", "step"}
    assert all(line.pop("left_out") == 0 and line.keys() == names and min(line.values()) > 0 for line in each + pairs)
    assert [line["step"] for line in each] == [1, 2, 3, 4] and [line["step"] for line in pairs] == [2, 4]
    assert [line["lr"] for line in each] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    for line, first, second in zip(pairs, each[::2], each[1::2]):
        for name in names - {"step", "evaluations_per_second"}:
            assert line[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-4)
    assert each[0]["loss"] == pytest.approx(each[0]["mse"] + 0.1 * each[0]["cos"], rel=1e-4)


def test_a_sheet_shows_what_the_average_draws(sd15, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\nthe cat\n")
    arguments = ["--stage", 1, "--model", sd15, "--iters", 2, "--lr", 0.01, "--save-dtype", "float32"]
    arguments += ["--sample-every", 2, "--sample-prompts", tmp_path / "prompts.txt", "--out", tmp_path]
    assert run(*arguments) == 0
    assert [file.name for file in (tmp_path / "stage-1-run").glob("*.p*")] == ["sheet-0000002.png"]
    images = sample.generate(StableDiffusion.load(tmp_path / "stage-1"), ["a red cat", "the cat"], 8, 4.0)
    expected = np.array(image_grid(list(images), ["a red cat", "the cat"], 8)).astype(int)
    with Image.open(tmp_path / "stage-1-run/sheet-0000002.png") as sheet:
        assert np.abs(np.array(sheet) - expected).max() <= 1


# ---- what is refused ----


def one_error(capsys):
    """The one line that a refused command says."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


REFUSED = [
    ([], "name a --stage; or, for a stage of your own, --windows and --teacher"),
    (["--windows", 4], "name a --stage; or, for a stage of your own, --windows and --teacher"),
    (["--stage", 1, "--model", "nowhere"], "the model nowhere does not exist; check the path"),
    (["--stage", 1, "--student", "nowhere"], "the model nowhere does not exist; check the path"),
    (["--stage", 2], "stage-1 does not exist; train stage 1 first, or name a --teacher"),
    (["--stage", 1, "--starts", 1.5], "--starts is a share, from 0 to 1, not 1.5"),
    (["--stage", 1, "--own-starts", -1], "--own-starts is a share, from 0 to 1, not -1.0"),
    (["--stage", 1, "--batch-size", 0], "--batch-size must be at least 1, not 0"),
    (["--stage", 1, "--points", 0], "--points must be at least 1, not 0"),
    (["--stage", 1, "--solver-steps", -1], "--solver-steps"),
    (["--stage", 1, "--workers", -1], "--workers"),
    (["--stage", 1, "--seed", -1], "seed must be from 0"),
    (["--stage", 1, "--size", 100], "size 100 does not fit"),
    (["--stage", 1, "--size", 32], "size 32"),
    (["--stage", 1, "--data", "nowhere"], "nowhere does not exist; check the path"),
    (["--stage", 1, "--sample-every", 1, "--sample-prompts", "nowhere"], "cannot read the prompts in nowhere"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=[" ".join(map(str, arguments)) for arguments, _ in REFUSED])
def test_a_wrong_argument_is_one_clear_line_and_exit_code_2(sd15, tmp_path, capsys, arguments, message):
    model = [] if {"--model", "--teacher"} & set(arguments) else ["--model", sd15]
    assert run("--out", tmp_path, "--iters", 1, *model, *arguments) == 2
    assert message in one_error(capsys)


def test_a_single_file_is_refused_with_the_command_that_helps(sd15, tmp_path, capsys):
    file = sd15 / "unet/diffusion_pytorch_model.safetensors"
    assert run("--stage", 1, "--model", file, "--out", tmp_path) == 2
    assert f"{file} is a single file; make a folder of it: python layouts.py {file} FOLDER" in one_error(capsys)


def test_a_folder_without_latents_or_images_is_refused(sd15, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    assert run("--stage", 1, "--model", sd15, "--data", tmp_path / "data", "--out", tmp_path) == 2
    assert f"{tmp_path / 'data'} holds neither latents nor captioned images" in one_error(capsys)


def test_latents_of_another_size_are_refused(sd15, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    data.write_latents(tmp_path / "data/a.safetensors", torch.ones(3, 4, 4, 4), torch.zeros(3, 4, 4, 4), ["a"] * 3)
    assert run("--stage", 1, "--model", sd15, "--iters", 1, "--data", tmp_path / "data", "--out", tmp_path) == 2
    assert "4" in one_error(capsys)


def test_a_folder_of_images_trains_sdxl_with_each_images_sizes(sdxl, tmp_path, monkeypatch):
    for name, width in ("a", 96), ("b", 128):
        file = tmp_path / f"images/{name}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (width, 64)).save(file)
        file.with_suffix(".txt").write_text("the cat")
    seen = []
    prepare = train.prepare
    monkeypatch.setattr(train, "prepare", lambda *given: seen.append(prepare(*given)) or seen[-1])
    arguments = ["--stage", 1, "--model", sdxl, "--iters", 1, "--data", tmp_path / "images", "--workers", 1]
    assert run(*arguments, "--out", tmp_path) == 0
    expected = [[64, 96, 0, 16, 64, 64], [64, 128, 0, 32, 64, 64]]
    assert sorted(seen[0]["time_ids"].tolist()) == expected


def test_damaged_shards_train_two_processes_with_readers_and_a_kill_leaves_no_trace(sd15, tmp_path, start):
    broken = set(range(50, 2000, 100))
    for k, keys in enumerate((range(700), range(700, 1400), range(1400, 2000))):
        write_shard(tmp_path / f"laion/{k:05d}.tar", keys, broken)
    content = (tmp_path / "laion/00002.tar").read_bytes()
    (tmp_path / "laion/00002.tar").write_bytes(content[:-20000])  # cut short, as by a full disk
    arguments = ["--stage", 1, "--model", sd15, "--data", tmp_path / "laion", "--iters", 12, "--save-every", 4]
    arguments += ["--batch-size", 12, "--workers", 2, "--seed", 1]
    whole = start(*arguments, "--out", tmp_path / "whole", processes=2)
    output, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors
    assert "laion/00002.tar is damaged" in errors and "is left out: cannot identify image file" in errors
    folder = tmp_path / "killed/stage-1-run"
    killed = start(*arguments, "--out", tmp_path / "killed", processes=2)
    wait_until_logged(killed, folder, 6)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    resumed = start(*arguments, "--out", tmp_path / "killed", "--resume", processes=2)
    resumed.communicate(timeout=240)
    logs = log_of(tmp_path / "whole/stage-1-run"), log_of(folder)
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]] and len(logs[0]) == 12
    assert sum(line["left_out"] for line in logs[0]) >= errors.count("is left out") > 0
    assert identical(state_of(tmp_path / "whole/stage-1-run"), state_of(folder))


def test_an_error_in_a_reader_of_data_is_one_line_as_well(sd15, tmp_path, capsys):
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
        (tmp_path / f"{i}.txt").write_text("a caption")
    arguments = ["--stage", 1, "--model", sd15, "--iters", 1, "--data", tmp_path, "--workers", 1]
    assert run(*arguments, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 11 of 12 images cannot be used")


def test_latents_of_another_vae_are_refused(sd15, tmp_path, capsys):
    vae = StableDiffusion.load(sd15).vae
    vae.quant_conv.weight.data = vae.quant_conv.weight + 1
    data.cache(vae, data.Scenes(0), 2, tmp_path / "latents")
    assert run("--stage", 1, "--model", sd15, "--data", tmp_path / "latents", "--out", tmp_path) == 2
    assert "latents of another VAE" in capsys.readouterr().err.splitlines()[-1]


def test_training_on_cached_latents_is_training_on_their_images(sd15, tmp_path):
    """But for the half precision in which latents are kept. A cache comes in another order than scenes without end, so
    this one is of a single image."""
    data.cache(StableDiffusion.load(sd15).vae, data.Scenes(0), 1, tmp_path / "latents")
    lines = []
    for name, arguments in ("images", []), ("latents", ["--data", tmp_path / "latents"]):
        arguments = ["--stage", 1, "--model", sd15, "--iters", 1, "--batch-size", 1, *arguments]
        assert run(*arguments, "--out", tmp_path / name) == 0
        lines += log_of(tmp_path / name / "stage-1-run")
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=5e-3)
    assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=5e-3)


@pytest.fixture
def finished(stages, tmp_path, capsys):
    """The arguments of a run with a checkpoint, and the checkpoint."""
    out, _ = stages
    shutil.copytree(out / "stage-1-run", tmp_path / "stage-1-run")
    capsys.readouterr()  # what `stages` said is not what the test is about
    arguments = ["--stage", 1, "--model", out / "base", "--iters", 2, "--lr", 0.01, "--out", tmp_path]
    return arguments, tmp_path / "stage-1-run/step-0000002"


def test_a_run_that_is_there_already_is_not_trained_over(finished, capsys):
    arguments, folder = finished
    assert run(*arguments) == 2
    assert f"{folder} is there already; go on with --resume, or choose another --out" in one_error(capsys)


@pytest.mark.parametrize("name, before, now", [("lr", "0.01", "0.02"), ("seed", "0", "1"), ("batch-size", "2", "3")])
def test_a_run_is_not_resumed_with_other_settings(finished, capsys, name, before, now):
    arguments, folder = finished
    assert run(*arguments, "--resume", f"--{name}", now) == 2
    setting = name.replace("-", "_")
    assert f"{folder} was made with {setting} {before}, not {now}; --resume keeps settings" in one_error(capsys)


def test_a_run_is_not_resumed_by_another_number_of_processes(finished, capsys):
    arguments, folder = finished
    edit(folder / "settings.json", processes="2")
    assert run(*arguments, "--resume") == 2
    assert f"{folder} was made with processes 2, not 1" in one_error(capsys)


def test_a_damaged_checkpoint_is_named(finished, capsys):
    arguments, folder = finished
    content = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(content[: len(content) // 2])
    assert run(*arguments, "--resume") == 2
    assert f"{folder} is damaged (" in one_error(capsys)
