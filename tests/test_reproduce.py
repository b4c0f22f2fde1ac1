"""From data to the paper's tables: every command exists, nothing is done twice, and a run may end and go on."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import test_readme
from helpers import ONE_THREAD, ROOT, exit_code, write
from PIL import Image
from test_runs import wait_until_logged
from test_train import log_of, state_of

from model import MINIATURE
from paper import reproduce
from support.errors import InputError

COLORS = "red", "green", "blue", "yellow"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A made-up COCO of four images in each year, and captioned images to train on. The options that name them."""
    folder = tmp_path_factory.mktemp("with a space")
    (folder / "coco/annotations").mkdir(parents=True)
    (folder / "data").mkdir()
    for i, color in enumerate(COLORS):
        Image.new("RGB", (64, 64), color).save(folder / f"data/{i}.png")
        (folder / f"data/{i}.txt").write_text(f"a {color} square")
    rng = np.random.default_rng(0)
    for year in "val2014", "val2017":
        (folder / f"coco/{year}").mkdir()
        for i in range(len(COLORS)):
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / f"coco/{year}/{i}.jpg")
        images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(COLORS))]
        captions = [{"image_id": i, "caption": f"a {color} circle"} for i, color in enumerate(COLORS)]
        write(folder / f"coco/annotations/captions_{year}.json", {"images": images, "annotations": captions})
    return ["--data", folder / "data", "--coco", folder / "coco"]


def model_of_width(folder, width):
    (folder / "unet").mkdir(parents=True)
    write(folder / "unet/config.json", {"cross_attention_dim": width})
    return folder


@pytest.fixture
def started(monkeypatch):
    """The commands. Instead of running, each leaves an empty result; one fails when `started.failing` is in it."""

    class Started(list):
        failing = None

    started = Started()

    def run(line):
        command = shlex.join(line)
        if started.failing and started.failing in command:
            raise InputError(f"exit code 2: {command}")
        started.append(command)
        options = dict(zip(line, line[1:]))
        out = reproduce.Path(options.get("--out", "."))
        made = {"evaluation.coco": out / "prompts.txt", "tools.cache": out / "made_of.json"}
        made |= {"sample.py": out / "sheet.png", "fid.py": reproduce.Path(options.get("--save-stats", "/dev/null"))}
        if "--stage" in options:
            made["--stage"] = out / f"stage-{options['--stage']}-run/result"
            (out / f"stage-{options['--stage']}").mkdir(parents=True, exist_ok=True)
        for file in (file for word, file in made.items() if word in line):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(command)
        number = len(started)
        return (
            f"FID {number}.5: of generated 4 of\n" if "fid.py" in line else f"CLIP score {number}.25: over 4 images\n"
        )

    monkeypatch.setattr(reproduce, "run", run)
    return started


@pytest.mark.parametrize("width, small", [(768, "coco2014-30k"), (2048, "coco2014-10k")])
def test_every_command_is_one_that_its_program_understands(given, tmp_path, capsys, monkeypatch, width, small):
    model = model_of_width(tmp_path / "model", width)
    arguments = ["--model", model, *given, "--inception", __file__, "--clip", tmp_path, "--out", tmp_path / "out"]
    assert exit_code(reproduce, *arguments, "--list", "--images", 3, "--guidance", 2, 4, "--", "--iters", 5) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists()
    # Prompts and references; latents, three stages; images of five rows at two scales, and two scores of each.
    assert len(lines) == 2 * 2 + 1 + 3 + 2 * 5 * 2 * 3
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: parse(self) and self.exit(77))
    for line in lines:
        name, words = test_readme.program_of(line)
        assert test_readme.run(name, *words) == 77, line
        assert line.startswith("torchrun" if name != "evaluation.coco" else "python -m evaluation.coco coco")
    assert sum(f"--protocol {small} " in line for line in lines) == 1 + 5 * 2
    assert all(line.endswith("--resume --iters 5") for line in lines if "train.py --stage" in line)


def test_what_is_finished_is_skipped_and_what_failed_goes_on(given, tmp_path, started, capsys):
    inception = tmp_path / "inception.pth"
    inception.touch()
    command = ["--model", MINIATURE, *given, "--inception", inception, "--out", tmp_path / "out"]
    started.failing = "--stage 2"
    assert exit_code(reproduce, *command) == 2
    errors = capsys.readouterr().err
    assert "no --clip, so no CLIP score" in errors and "train.py --stage 2" in errors.splitlines()[-1]
    table = (tmp_path / "out/table.md").read_text()
    assert "| coco2014-30k | diffusion model, DDIM | 32 | 4 | 4 | 10.50 |  | 10.05 |" in table
    assert "| coco2017-5k | ProReflow-I | 4 | 4 |  |  |  | 22.97 / 30.29 |" in table
    first = len(started)
    started.failing = None
    assert exit_code(reproduce, *command) == 0
    assert "train.py --stage 2" in started[first] and len(set(started)) == len(started) == 4 + 1 + 3 + 2 * 5 * 2
    assert capsys.readouterr().out.count("| ProReflow-II | 2 | 4 | 4 | ") == 2
    started.clear()
    assert exit_code(reproduce, *command) == 0 and started == []
    # What was not given before; the images are looked at again.
    assert exit_code(reproduce, *command, "--clip", tmp_path) == 0
    assert len(started) == 2 * 5 * 2 and all("sample.py" in line or "clip_score" in line for line in started)


def test_what_depends_on_a_change_is_made_again(given, tmp_path, started):
    inception, out = tmp_path / "inception.pth", tmp_path / "out"
    inception.touch()
    command = ["--model", MINIATURE, *given, "--inception", inception, "--out", out]
    assert exit_code(reproduce, *command) == 0
    for change, expected in {
        lambda: inception.write_text("another"): {"fid.py", "sample.py"},
        lambda: (out / "stage-2-run/result").write_text("other weights"): {"--stage 3", "fid.py", "sample.py"},
        lambda: (out / "coco2017-5k/prompts.txt").unlink(): {"evaluation.coco coco2017-5k"},
        lambda: command.extend(["--", "--lr", "1"]): {"--stage 1", "--stage 2", "--stage 3", "fid.py", "sample.py"},
    }.items():
        started.clear()
        change()
        assert exit_code(reproduce, *command) == 0
        kinds = ["evaluation.coco coco2017-5k", "--stage 1", "--stage 2", "--stage 3", "fid.py", "sample.py"]
        assert {kind for kind in kinds if any(kind in line for line in started)} == expected
        assert all(any(kind in line for kind in expected) for line in started)
    rows = [line for line in started if "sample.py" in line]
    assert len(rows) == 2 * 3 and not any("stage-0" in line for line in rows)


def test_what_is_not_there_is_left_out_or_refused_before_the_work(given, tmp_path, started, capsys):
    command = ["--model", MINIATURE, *given[:2], "--out", tmp_path / "out"]
    assert exit_code(reproduce, *command) == 0
    assert "no --coco, so no images" in capsys.readouterr().err
    assert [line.split()[4:7] for line in started] == [
        ["-m", "tools.cache", "--model"],
        *(["train.py", "--stage", str(stage)] for stage in (1, 2, 3)),
    ]
    (tmp_path / "coco/annotations").mkdir(parents=True)
    assert exit_code(reproduce, *command, "--coco", tmp_path / "coco") == 0
    assert "no val2017 or its captions in " in capsys.readouterr().err
    started.clear()
    for more, message in {
        ("--clip", tmp_path / "none"): "--clip ",
        ("--", "--lr", "-1"): "--lr: must be a number above 0",
    }.items():
        assert exit_code(reproduce, *command, *more) == 2 and not started
        assert message in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        assert exit_code(reproduce, *command) == 2 and not started
    assert "start this without torchrun" in capsys.readouterr().err
    # An option that train.py does not have; and latents that are there already.
    write(tmp_path / "made_of.json", {})
    (tmp_path / "00000.safetensors").touch()
    command[3] = tmp_path
    assert exit_code(reproduce, *command, "--launcher", "srun torchrun", "--", "--gap", 0.5) == 0
    assert len(started) == 3 and started[0].startswith("srun torchrun -m paper.variants --stage 1 ")
    assert f"--data {tmp_path} " in started[0] and started[0].endswith("--gap 0.5")


def test_a_signal_ends_the_command_first(capsys):
    program = """if True:
    import os, signal, sys
    def stop(*_):
        print("saved", flush=True)
        sys.exit(1)
    signal.signal(signal.SIGTERM, stop)
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
        signal.pause()
    """
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run([sys.executable, "-c", program])
    assert capsys.readouterr().out == "saved\n" and signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(InputError, match="exit code 7, .* -c"):
        reproduce.run(["python", "-c", "exit(7)"])
    assert reproduce.run(["python", "-c", "print('FID 1.5: mode')"]) == "FID 1.5: mode\n"


@pytest.mark.slow
def test_from_images_to_a_table_of_scores(given, inception_file, tmp_path, monkeypatch, capsys):
    """The real programs, within this process, for three of the rows."""

    def run(line):
        capsys.readouterr()
        name, words = test_readme.program_of(shlex.join(line))
        code = test_readme.run(name, *words)
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce, "ROWS", ((0, 4, "dpm++"), (2, 4, "flow"), (3, 2, "flow")))
    command = ["--model", MINIATURE, *given, "--inception", inception_file, "--clip", ROOT / "weights/miniature-clip"]
    command += ["--out", tmp_path, "--images", 3, "--", "--iters", 2, "--batch-size", 2, "--sample-every", 0]
    assert exit_code(reproduce, *command) == 0
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if "| coco20" in line]
    assert [row[1] for row in rows] == 2 * ["diffusion model, DPM-Solver++ 2M", "ProReflow-I", "ProReflow-II"]
    assert all(row[4] == "3" and float(row[5]) > 1 and 0 < float(row[6]) < 100 for row in rows)
    assert len({(row[5], row[6]) for row in rows}) == 6
    notes = json.loads((tmp_path / "results.json").read_text())
    assert "mode legacy" in notes["coco2017-5k-3/stage-2-flow-4-steps-guidance-4 FID"]["printed"]
    monkeypatch.setattr(reproduce, "run", None)
    assert exit_code(reproduce, *command) == 0


@pytest.mark.slow
def test_two_processes_are_stopped_in_training_and_one_goes_on(given, tmp_path):
    def command(launcher, size, iters):
        how = ["--out", tmp_path, "--launcher", launcher, "--", "--cooldown", 0, "--sample-every", 0]
        how += ["--save-every", 1000, "--batch-size", size, "--iters", iters]
        return list(map(str, [sys.executable, "-m", "paper.reproduce", "--model", MINIATURE, *given[:2], *how]))

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ONE_THREAD}
    both = command("torchrun --standalone --nproc-per-node 2", 1, 1000)
    process = subprocess.Popen(both, start_new_session=True, **pipes)
    try:
        wait_until_logged(process, tmp_path / "stage-1-run", 2)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and error.endswith("stopped; the same command goes on where it was\n")
    step = state_of(tmp_path / "stage-1-run")["step"]
    assert 2 <= step < 1000
    # An update has as many samples as before.
    done = subprocess.run(command("python", 2, step + 1), **pipes)
    assert done.returncode == 0, done.stderr
    assert "tools.cache" not in done.stdout and f"resumed at update {step}\n" in done.stdout
    assert [log_of(tmp_path / f"stage-{stage}-run")[-1]["step"] for stage in (1, 2, 3)] == 3 * [step + 1]
