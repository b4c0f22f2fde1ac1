"""The paper's tables: compared methods cost the same, nothing is done twice, and the table says what was measured."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import exit_code, refusal

from model import MINIATURE, StableDiffusion
from paper import figures, reproduce, tables
from paper.tables import METHODS
from support import datasets
from tools.cache import cache


@pytest.fixture
def commands(monkeypatch):
    """The trainer's command lines; instead of training, each leaves an empty folder."""
    seen = []

    def train(command):
        options = dict(zip(command, command[1:]))
        (tables.Path(options["--out"]) / options["--name"]).mkdir(parents=True)
        seen.append(options)

    monkeypatch.setattr(reproduce, "run", train)
    return seen


def trained(name, seed, cost, folder):
    return tables.trained(METHODS[name], seed, cost, SimpleNamespace(out=folder, data=folder / "latents"))


@pytest.mark.parametrize("names", [("published", "perflow", "i", "at-once", "plain"), ("ii", "two"), ("one", "reflow")])
def test_methods_that_are_compared_cost_the_same(tmp_path, commands, names):
    costs = [trained(name, 0, 250_000, tmp_path)[1] for name in names]
    assert max(costs) < 1.002 * min(costs)
    shares = sum(stage.share for stage in METHODS[names[0]].stages)
    assert costs[0] == pytest.approx(shares * 250_000, rel=0.002)
    assert ["--epsilon-loss" in options for options in commands[:2]] == [names[0] == "published", False]


def test_one_row_has_the_updates_of_another(tmp_path, commands):
    trained("i", 0, 250_000, tmp_path)
    trained("updates", 0, 250_000, tmp_path)
    *stages, at_once = [int(options["--iters"]) for options in commands]
    assert at_once == pytest.approx(sum(stages), rel=0.002)


def test_a_method_goes_on_from_the_stages_of_another_and_none_is_trained_twice(tmp_path, commands):
    folder, cost = trained("i", 0, 9000, tmp_path)
    # 20 updates of 4 DDIM steps a sample, 28 of 2 windows of the flow; and three for the student
    assert [options["--iters"] for options in commands] == ["20", "28"] and cost == 64 * (20 * (4 + 3) + 28 * (2 + 3))
    again, more = trained("ii", 0, 9000, tmp_path)
    assert [options["--windows"] for options in commands] == ["8", "4", "2"]
    teachers = [MINIATURE, folder.parent / commands[0]["--name"], folder]
    assert [options["--teacher"] for options in commands] == list(map(str, teachers))
    assert more > cost and again != folder
    trained("plain", 0, 9000, tmp_path)  # the same windows, another loss
    trained("i", 1, 9000, tmp_path)  # another seed
    assert [(new["--alpha"], new["--seed"]) for new in commands[3:]] == [("0", "0")] * 2 + [("0.1", "1")] * 2


def test_a_failed_training_ends_the_run_with_one_line(tmp_path, monkeypatch):
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda line, **how: start([sys.executable, "-c", "exit(2)"], **how))
    assert "exit code 2, see above; what is finished is kept" in refusal(trained, "i", 0, 9000, tmp_path)


@pytest.mark.slow
def test_a_method_is_trained_scored_and_then_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tables.RUNS, "ddim", tables.Method("the teacher", (), {2: ""}))
    command = ["--methods", "ddim", "perflow", "--seeds", 3, "--cost", 256, "--prompts", 1, "--images", 4]
    command += ["--out", tmp_path / "out", "--data", tmp_path / "latents", "--json", tmp_path / "rows.json"]
    assert exit_code(tables, *command) == 2
    assert "holds no latents; make them: python -m tools.cache" in capsys.readouterr().err
    cache(StableDiffusion.load(MINIATURE), datasets.Scenes(0), 32, tmp_path / "latents")
    assert exit_code(tables, *command) == 0
    teacher, ours = json.loads((tmp_path / "rows.json").read_text())
    assert (teacher["method"], teacher["steps"], teacher["evaluations"]) == ("ddim", 2, 4)
    assert (ours["method"], ours["seed"], ours["training"]) == ("perflow", 3, 64 * 11)
    assert ours["teacher"] == teacher["teacher"]
    monkeypatch.setattr(reproduce, "run", None)
    monkeypatch.setattr(tables, "measure", None)
    assert exit_code(tables, *command) == 0


def test_the_table_has_means_and_spreads_of_one_cost_alone():
    scores = {"one item": 0.5, "two items": 0.25, "clip": 50.0}
    ours = scores | {"method": "i", "steps": 4, "evaluations": 8, "cost of a stage": 9, "training": 2_000_000}
    teacher = {"method": "ddim", "steps": 32, "evaluations": 64, "frechet": 8.0, "one item, guidance 4": 0.9}
    rows = [scores | teacher, ours | {"frechet": 10.0}, ours | {"frechet": 14.0}]
    lines = tables.table([*rows, ours | {"frechet": 99.0, "cost of a stage": 1}], 9).splitlines()
    assert lines[2] == "| the teacher, DDIM | 32 | 64 |  |  | 8.00 | 50.00 | 50.0% | 25.0% | 90.0% |  | 10.05 |"
    i = "| **ProReflow-I**: 8, then 4 windows | 4 | 8 | 2.00 | 2 | 12.00 ± 2.83 | 50.00 ± 0.00 "
    assert lines[3] == i + "| 50.0% ± 0.0% | 25.0% ± 0.0% |  |  | 11.16 / 22.97 |" and len(lines) == 4


def test_the_page_shows_what_was_measured_of_the_last_teacher(tmp_path, monkeypatch):
    page, here = (figures.HERE / "README.md").read_text(encoding="utf-8"), tmp_path / "paper"
    (here / "figures").mkdir(parents=True)
    (here / "README.md").write_text(page.replace("| 0.12 |", "| 9.99 |"), encoding="utf-8")
    rows = figures.HERE / "results/experiments.json"
    drawn = []
    monkeypatch.setattr(figures, "HERE", here)
    monkeypatch.setattr(figures, "save", lambda figure, file: drawn.extend(figure.axes))
    assert exit_code(tables, "--table", "--json", rows) == 0
    assert (here / "README.md").read_text(encoding="utf-8") == page
    assert [len(line.get_xdata()) for axis in drawn for line in axis.lines] == [4, 4]  # 8 windows, and 4
    assert [axis.get_xlabel() for axis in drawn] == ["alpha"]
