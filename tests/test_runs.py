"""How a training run starts, stops and goes on: what clusters and people do to it."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import ONE_THREAD, refusal, rewrite
from PIL import Image
from test_train import SHORT, log_of, run, state_of

import train
from model import StableDiffusion
from paper import variants
from support import datasets, devices, errors, runs
from support.loader import SIGNALS, Stop

UNET = "unet/diffusion_pytorch_model.safetensors"
ALONE = devices.Process(0, 1, torch.device("cpu"))
slow = pytest.mark.slow


@pytest.fixture
def start():
    """Start the trainer in the background; it does not outlive the test."""
    started = []

    def start(*arguments, processes=1, **env):
        command = helpers.command(variants, *SHORT, *arguments, processes=processes)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=ONE_THREAD | env, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until_logged(process, folder, step):
    deadline = time.monotonic() + 240
    while not any(line["step"] >= step for line in log_of(folder)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def networks(sd15):
    return StableDiffusion.load(sd15), parts()["student"]


@pytest.fixture
def begin(sd15, tmp_path, networks, monkeypatch):
    """The start of stage 1 of a copy of sd15, with a small network for its student: (arguments, what it returns)."""
    shutil.copytree(sd15, tmp_path / "base")
    monkeypatch.setattr(train, "load_networks", lambda *_: networks)
    monkeypatch.setattr(devices.Process, "sharded", lambda self, optimizer: optimizer)  # which needs processes

    def begin(world=1, **given):
        args = train.arguments().parse_args(["--stage", "1", "--resume"])
        ours = {"model": tmp_path / "base", "out": tmp_path, "batch_size": 2, "iters": 4, "cooldown": 0.0}
        vars(args).update(ours | given)
        return args, train.begin(args, devices.Process(0, world, torch.device("cpu")))

    return begin


# ---- 1. nothing finished is overwritten; 2. one run per folder ----


def command(tmp_path, **given):
    """What `train.settle` makes of a command."""
    (tmp_path / "base").mkdir(exist_ok=True)
    args = {"name": "stage-1", "teacher": tmp_path / "base", "data": None, "resume": False, "out": tmp_path}
    args = SimpleNamespace(**dict.fromkeys(["base", "student"], tmp_path / "base") | args | given)
    args.run, args.result = args.out / f"{args.name}-run", args.out / args.name
    return args


@pytest.mark.parametrize("kind", ["teacher", "student", "data"])
@pytest.mark.parametrize("out, name", [("base/out", "a"), (".", "base"), (".", "above")])
def test_a_result_never_replaces_what_it_is_made_from(tmp_path, out, name, kind):
    """Its folder is not, holds not and lies not in one of these; but it may stand beside them."""
    used, other = tmp_path / "above/base", tmp_path / "other"
    used.mkdir(parents=True)
    (tmp_path / "base").symlink_to(used)
    args = command(
        tmp_path, **{"base": other, "teacher": other, "student": other, kind: used}, out=tmp_path / out, name=name
    )
    assert "which is needed; choose another --out" in refusal(runs.claim, args)
    assert list(used.iterdir()) == []
    runs.claim(command(tmp_path, **{kind: used}))


def test_only_what_this_run_made_is_replaced(begin, sd15, tmp_path):
    args, (_, state, _, settings, start) = begin()
    assert start == 0
    with runs.recorded(args):
        shutil.copytree(sd15, args.result)
    assert begin()[1][4] == 0
    runs.save_checkpoint(ALONE, args.run, state, settings, 2)
    assert "step-0000002.pt is there already; go on with --resume" in refusal(begin, resume=False)
    rewrite(args.result / UNET, lambda weights: {name: 2 * weight for name, weight in weights.items()})
    assert f"{args.result} is there already, but not from {args.run}" in refusal(begin)
    shutil.rmtree(args.run)
    assert f"{args.result} is there already, but not from {args.run}" in refusal(begin)


def test_one_run_per_folder_until_its_process_ends(tmp_path):
    args = command(tmp_path)

    def claim_in_another_process():
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            runs.claim(args)
            os._exit(0)
        except Exception as error:
            os._exit(1 if f"another process trains in {args.run}" in str(error) else 2)

    assert claim_in_another_process() == 0
    runs.claim(args)
    assert claim_in_another_process() == 1


def test_a_disk_without_locks_can_be_used(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(38, "no locks here")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    runs.claim(command(tmp_path))


def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch):
    monkeypatch.setattr(os, "environ", {"SLURM_NTASKS": "1"})
    assert devices.rank_and_world() == (0, 1)
    for env in {"SLURM_NTASKS": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}:
        monkeypatch.setattr(os, "environ", env)
        assert "start them with torchrun" in refusal(devices.rank_and_world)
    started = {"SLURM_NTASKS": "2", "RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    monkeypatch.setattr(os, "environ", started)
    assert devices.rank_and_world() == (1, 4)


def test_cuda_is_the_gpu_of_this_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [devices.choose_device(wanted) for wanted in ("cuda", None, "cuda:1")] == ["cuda:3", "cuda:3", "cuda:1"]


# ---- 3. signals ----


@pytest.mark.parametrize("which", SIGNALS)
def test_a_signal_lets_the_update_finish_and_may_come_twice(which):
    before = [signal.getsignal(one) for one in SIGNALS]
    with Stop() as stop:
        os.kill(os.getpid(), which)
        if which != signal.SIGINT:
            os.kill(os.getpid(), which)
        assert stop.next(iter([1])) is None
        with pytest.raises(KeyboardInterrupt):  # a second one; for others the first, but the second signal
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_signal_is_noticed_while_waiting_for_data():
    def endless():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        except Exception:  # as readers do to name a broken image
            time.sleep(600)
        yield

    with Stop() as stop:
        assert stop.next(iter(["batch"])) == "batch"
        assert stop.next(endless()) is None


def test_a_signal_that_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.next(iter(["batch"])) == "batch"
    signal.signal(signal.SIGHUP, before)


@slow
def test_sigterm_to_torchrun_and_to_all_its_processes_saves_the_update(sd15, tmp_path, start):
    arguments = ["--stage", 1, "--model", sd15, "--iters", 500, "--save-every", 1000, "--out", tmp_path]
    process, folder = start(*arguments, "--workers", 1, processes=2), tmp_path / "stage-1-run"
    wait_until_logged(process, folder, 2)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert "stopped; the same command with --resume goes on from the last checkpoint" in error
    assert state_of(folder)["step"] == log_of(folder)[-1]["step"] < 500


# ---- 4. several machines ----


def several(*answers):
    """A process that hears these answers of the others, ranks 1, 2, ..."""
    return SimpleNamespace(rank=0, world=1 + len(answers), gather=lambda mine: [mine, *answers])


def test_all_go_on_or_all_end_with_the_ranks_that_cannot():
    assert runs.together(several(None, None), lambda: 5) == 5
    assert refusal(runs.together, several("a is missing", None, "a is missing"), lambda: 5) == "rank 1, 3: a is missing"

    def fail():
        raise OSError("no such folder")

    assert refusal(runs.together, several(None), fail) == "rank 0: no such folder"
    assert refusal(runs.together, ALONE, fail) == "no such folder"


@pytest.mark.parametrize("name", ["data", "checkpoint"])
def test_a_machine_that_has_loaded_other_things_names_them_and_their_folder(tmp_path, name):
    args = command(tmp_path, data=tmp_path / "images")
    facts = {"teacher": 1, "data": 1, "checkpoint": 1}
    other = SimpleNamespace(gather=lambda mine: [facts | {name: 2}, mine])
    folder = getattr(args, name, args.run)
    expected = f"{name} is 1, but 2 in rank 0; all machines must share {folder}"
    assert refusal(runs.same_as_first, other, facts, args) == expected
    runs.same_as_first(several(facts), facts, args)


@slow
def test_a_process_that_dies_ends_the_others(sd15, tmp_path, start):
    """As on two machines, without a torchrun that would end them."""
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000), "WORLD_SIZE": "2"}
    arguments = ["--stage", 1, "--model", sd15, "--iters", 1000, "--out", tmp_path]
    first, second = (start(*arguments, RANK=str(rank), **both) for rank in (0, 1))
    wait_until_logged(first, tmp_path / "stage-1-run", 1)
    second.kill()
    _, error = first.communicate(timeout=120)
    assert first.returncode == 2 and "error: another process has ended" in error


# ---- 5. resuming ----


def test_a_resumed_run_keeps_its_settings_but_not_how_it_computes_them(begin, tmp_path):
    args, (_, state, _, settings, _) = begin(world=2)
    runs.save_checkpoint(ALONE, args.run, state, settings, 2)
    for changed, message in {
        ("lr", 0.5): "lr 0.0003, not 0.5",
        ("batch_size", 3): "batch 4, not 6",
        ("cooldown", 0.5): "cooldown 0.0, not 0.5",
    }.items():
        expected = f"step-0000002.pt was made with {message}; --resume keeps settings"
        assert expected in refusal(begin, world=2, **dict([changed]))
    assert begin(batch_size=1, grad_accum_steps=4, iters=9)[1][4] == 2  # also longer, as the rate is constant
    runs.save_checkpoint(ALONE, args.run, state, settings | {"cooldown": 0.5, "iters": 4}, 3)
    assert "was made with iters 4, not 9" in refusal(begin, world=2, cooldown=0.5, iters=9)
    (args.run / "step-0000003.pt").unlink()
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    there = {"out": moved, "model": moved / "base", "grad_accum_steps": 2}
    assert begin(**there)[1][4] == 2
    rewrite(moved / "base" / UNET, lambda weights: {name: weight + 1e-3 for name, weight in weights.items()})
    assert "was made with teacher " in refusal(begin, **there)


def test_one_image_more_is_other_data(tmp_path):
    for name in "a", "b":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    before = runs.samples_in(datasets.Folder(tmp_path, 64))
    copy = shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    assert runs.samples_in(datasets.Folder(copy, 64)) == before
    (copy / "b.png").rename(copy / "c.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "c.png")
    assert len({before, *(runs.samples_in(datasets.Folder(where, 64)) for where in (copy, tmp_path))}) == 3
    assert runs.samples_in(datasets.Scenes(0)) != runs.samples_in(datasets.Scenes(1))


@slow
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(sd15, tmp_path, start):
    arguments = ["--stage", 1, "--model", sd15, "--iters", 6, "--save-every", 2]
    killed, folder = start(*arguments, "--out", tmp_path / "killed"), tmp_path / "killed/stage-1-run"
    wait_until_logged(killed, folder, 3)  # one update past the first checkpoint
    killed.kill()
    killed.communicate()
    (folder / "step-0000004.pt.partial").write_bytes(b"0" * 1000)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"loss": 0.1')  # as if it had been hit while writing this line
    assert run(*arguments, "--out", tmp_path / "whole") == 0
    assert run(*arguments, "--out", tmp_path / "killed", "--resume") == 0
    names = {"lock", "log.jsonl", "result", "step-0000004.pt", "step-0000006.pt"}
    assert {path.name for path in folder.iterdir()} == names
    expected, state = (state_of(tmp_path / name / "stage-1-run") for name in ("whole", "killed"))
    for part in "student", "ema", "optimizer", "step":
        torch.testing.assert_close(state[part], expected[part], rtol=0, atol=0)
    assert (tmp_path / "killed/stage-1" / UNET).read_bytes() == (tmp_path / "whole/stage-1" / UNET).read_bytes()
    logs = [log_of(tmp_path / name / "stage-1-run") for name in ("whole", "killed")]
    assert [line["step"] for line in logs[0]] == list(range(1, 7))
    assert all(line.pop("seconds") >= 0 for log in logs for line in log) and logs[0] == logs[1]


# ---- 6. checkpoints ----


def parts():
    """What a checkpoint holds: a network and an optimizer's state."""
    network = torch.nn.Linear(30, 30)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(30)).sum().backward()
    optimizer.step()
    return {"student": network, "optimizer": optimizer}


def test_two_checkpoints_are_kept(tmp_path):
    for step in 0, 9, 10, 10, 11:
        runs.save_checkpoint(ALONE, tmp_path, parts(), {}, step)
        runs.save_checkpoint(devices.Process(1, 2, torch.device("cpu")), tmp_path, parts(), {}, 12)
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-0000010.pt", "step-0000011.pt"]
    assert runs.load_checkpoint(tmp_path, parts(), {}, 20) == 11
    assert "is already past --iters 10; give at least 11" in refusal(runs.load_checkpoint, tmp_path, parts(), {}, 10)


@pytest.mark.parametrize("damage", ["empty", "zeros", "cut short", "one bit of a weight"])
def test_damage_is_noticed_and_the_way_on_is_named(tmp_path, damage):
    for step in 1, 2:
        saved = parts()
        runs.save_checkpoint(ALONE, tmp_path, saved, {}, step)
    file = tmp_path / "step-0000002.pt"
    whole = file.read_bytes()
    at = whole.index(saved["student"].weight.detach().numpy().tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    contents = {"empty": b"", "zeros": bytes(len(whole)), "cut short": whole[:-1], "one bit of a weight": flipped}
    file.write_bytes(contents[damage])
    message = refusal(runs.load_checkpoint, tmp_path, parts(), {}, 20)
    assert message.startswith(f"{file} is damaged (") and message.endswith("remove it to go on from step-0000001.pt")
    (tmp_path / "step-0000001.pt").unlink()
    assert refusal(runs.load_checkpoint, tmp_path, parts(), {}, 20).endswith("remove it to start anew")


def test_a_full_disk_costs_the_older_checkpoint_and_then_ends_the_run(tmp_path, monkeypatch):
    for step in 1, 2:
        runs.save_checkpoint(ALONE, tmp_path, parts(), {}, step)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # no file grows beyond
    try:
        message = refusal(runs.save_checkpoint, ALONE, tmp_path, parts(), {}, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert message.startswith(f"cannot write {tmp_path}/step-0000003.pt, is there room?")
    assert message.endswith(f"Last good: {tmp_path}/step-0000002.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002.pt"]
    runs.save_checkpoint(ALONE, tmp_path, parts(), {}, 3)
    assert runs.load_checkpoint(tmp_path, parts(), {}, 20) == 3


# ---- 7. the teacher's folder; 8. readers; 9. numbers ----


@slow
def test_the_result_is_complete_though_the_teacher_disappears(sd15_copy, tmp_path, monkeypatch):
    """Its folder may be on another machine's disk, or be trained again."""
    files = {file.relative_to(sd15_copy) for file in sd15_copy.rglob("*")}
    update = train.update_ema
    monkeypatch.setattr(train, "update_ema", lambda *given: update(*given) or shutil.rmtree(sd15_copy))
    assert run("--stage", 1, "--model", sd15_copy, "--iters", 1, "--out", tmp_path / "out") == 0
    assert {file.relative_to(tmp_path / "out/stage-1") for file in (tmp_path / "out/stage-1").rglob("*")} == files
    assert StableDiffusion.load(tmp_path / "out/stage-1").windows == 8


def test_a_result_that_cannot_be_written_is_finished_with_resume(tmp_path):
    args = command(tmp_path)
    args.run.mkdir()
    with pytest.raises(errors.InputError, match="full; then --resume finishes it from none was written yet"):
        with runs.recorded(args):
            raise errors.InputError("full")


@slow
def test_a_reader_of_data_that_dies_ends_the_run(sd15, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.Scenes, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert run("--stage", 1, "--model", sd15, "--workers", 1, "--iters", 1, "--out", tmp_path) == 2
    assert "error: DataLoader worker (pid" in capsys.readouterr().err


def test_every_number_has_its_range(capsys):
    for flags, wrong in {
        "--iters --batch-size --accumulate --save-every --windows --solver-steps": "0 -1 1.5 nan x",
        "--workers --sample-every --warmup": "-1 1.5 nan inf",
        "--seed": "-1 4294967296",
        "--lr": "0 -1 nan inf 1e400",
        "--alpha --teacher-guidance": "-5 nan inf",
        "--ema --cooldown --starts --gap": "-1 1.5 nan",
    }.items():
        for flag in flags.split():
            for number in wrong.split():
                assert helpers.exit_code(variants, "--stage", 1, flag, number) == 2
                (line,) = capsys.readouterr().err.splitlines()
                assert line.startswith(f"error: {flag}: must be ") and line.endswith(f", not {number}")


READER_FAILED = "Caught InputError in DataLoader worker\n  support.errors.InputError: a is empty\n"


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(28, "No space left on device", "log.jsonl"), "[Errno 28] No space left on device: 'log.jsonl'"),
        (errors.InputError(READER_FAILED), "a is empty"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "another process has ended"),
    ],
)
def test_what_ends_a_command_is_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as stop, errors.one_line_errors(errors.Parser()):
        raise error
    (said,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said.startswith(f"error: {line}")


def test_each_update_is_logged_at_once_and_not_twice_when_it_is_done_again(tmp_path):
    args = SimpleNamespace(run=tmp_path, iters=9, name="a")
    log = runs.Log(args, 0, quiet=False)
    for step in 1, 2:
        log.add(step, {"loss": 1.0})
        assert log_of(tmp_path)[-1]["step"] == step
    assert runs.Log(args, 1, quiet=True).quiet and len(log_of(tmp_path)) == 2
    runs.Log(args, 1, quiet=False)
    assert [line["step"] for line in log_of(tmp_path)] == [1]
