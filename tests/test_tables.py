"""The experiments: compared methods cost the same, nothing is done twice, and the table says what was measured."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from helpers import exit_code

import data
from model import MINIATURE, StableDiffusion
from paper import tables as experiments
from paper.tables import METHODS


@pytest.fixture
def commands(monkeypatch):
    """The trainer's command lines; instead of training, each leaves an empty folder."""
    seen = []

    def train(command, env):
        told = dict(zip(command, command[1:]))
        (experiments.Path(told["--out"]) / told["--name"]).mkdir(parents=True)
        seen.append(told)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", train)
    return seen


def settings(tmp_path):
    return SimpleNamespace(teacher=MINIATURE, out=tmp_path, data=tmp_path / "latents")


@pytest.mark.parametrize(
    "names",
    [
        ("perflow", "i", "at-once", "plain", "i-half", "i-even", "i-guided"),
        ("ii", "two", "ii-guided"),
        ("one", "reflow", "one-guided"),
    ],
)
def test_methods_that_are_compared_cost_the_same(tmp_path, commands, names):
    costs = [experiments.trained(METHODS[name], 0, 250_000, settings(tmp_path))[1] for name in names]
    assert max(costs) < 1.002 * min(costs)
    shares = sum(stage.share for stage in METHODS[names[0]].stages)
    assert costs[0] == pytest.approx(shares * 250_000, rel=0.002)


def test_the_cost_of_an_update_counts_teacher_and_student():
    assert experiments.EIGHT.cost_of_update(None) == 64 * (4 + 3)  # 32 teacher steps over 8 windows
    assert experiments.FOUR.cost_of_update(8) == 64 * (2 + 3)  # a merging stage: two
    assert experiments.Stage(4).cost_of_update(None) == 64 * (8 + 3)  # PeRFlow
    assert experiments.Stage(4, points=4).cost_of_update(8) == 16 * (2 + 12)  # four points of each path
    assert experiments.Stage(8, guidance=2).cost_of_update(None) == 64 * (8 + 3)  # with and without the caption


def test_a_method_goes_on_from_the_stages_of_another_and_none_is_trained_twice(tmp_path, commands):
    folder, cost = experiments.trained(METHODS["i"], 0, 9000, settings(tmp_path))
    assert [told["--windows"] for told in commands] == ["8", "4"]
    assert commands[0]["--teacher"] == str(MINIATURE)
    assert commands[1]["--teacher"] == str(folder.parent / commands[0]["--name"])
    again, more = experiments.trained(METHODS["ii"], 0, 9000, settings(tmp_path))
    assert [told["--windows"] for told in commands] == ["8", "4", "2"]
    assert commands[2]["--teacher"] == str(folder) and more > cost and again != folder
    experiments.trained(METHODS["plain"], 0, 9000, settings(tmp_path))  # the same windows, another loss
    experiments.trained(METHODS["i"], 1, 9000, settings(tmp_path))  # another seed
    assert [(told["--alpha"], told["--seed"]) for told in commands[3:]] == [("0", "0")] * 2 + [("0.1", "1")] * 2


def test_a_methods_settings_reach_the_trainer(tmp_path, commands):
    experiments.trained(METHODS["perflow-even"], 2, 20_000, settings(tmp_path))
    experiments.trained(METHODS["i-guided"], 2, 20_000, settings(tmp_path))
    even, guided, eight, merged = commands
    assert (guided["--starts"], guided["--points"], guided["--alpha"]) == ("1", "1", "0.1")
    assert int(guided["--batch-size"]) == 4 * int(even["--batch-size"])
    assert (even["--windows"], even["--alpha"], even["--starts"]) == ("4", "0", "0.0")
    assert even["--teacher-guidance"] == "1.0"
    assert [told["--teacher-guidance"] for told in (guided, eight, merged)] == ["2.0", "1.0", "1.0"]


def test_a_failed_training_ends_the_run_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    with pytest.raises(experiments.InputError, match="the same command goes on"):
        experiments.trained(METHODS["i"], 0, 9000, settings(tmp_path))


def test_a_method_is_trained_scored_and_then_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "SOLVERS", [("ddim", 2), ("dpm++", 1)])
    command = ["--methods", "i", "ddim", "--seeds", 3, "--cost", 256, "--prompts", 1, "--images", 4]
    command += ["--out", tmp_path / "out", "--data", tmp_path / "latents", "--json", tmp_path / "rows.json"]
    command += ["--device", "cpu"]
    assert exit_code(experiments, *command) == 2
    assert "holds no latents; make them: python data.py cache" in capsys.readouterr().err
    data.cache(StableDiffusion.load(MINIATURE).vae, data.Scenes(0), 32, tmp_path / "latents")
    assert exit_code(experiments, *command) == 0
    teacher, ours = json.loads((tmp_path / "rows.json").read_text())
    assert (teacher["method"], teacher["steps"], teacher["evaluations"]) == ("ddim", 2, 4)
    assert (ours["method"], ours["seed"], ours["training"]) == ("i", 3, 64 * 7 + 64 * 5)
    assert ours["teacher"] == teacher["teacher"]
    assert StableDiffusion.load(tmp_path / "out" / ours["teacher"] / "cost-256/seed-3/w8_w4").windows == 4
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(experiments, "measure", None)
    assert exit_code(experiments, *command) == 0


def row(method, steps, frechet, **more):
    return {"method": method, "steps": steps, "evaluations": 2 * steps, "one item": 0.5, "two items": 0.25} | {
        "frechet": frechet, "clip": 50.0, **more
    }  # fmt: skip


def test_the_table_tells_means_and_spreads_of_one_cost_alone():
    flow = {"cost of a stage": 9, "training": 2_000_000}
    clear = {"one item, guidance 4": 0.9}  # a flow whose paths hold guidance has none such
    rows = [row("ddim", 32, 8.0, **clear), row("i", 4, 10.0, seed=0, **flow), row("i", 4, 14.0, seed=1, **flow)]
    rows.append(row("i", 4, 99.0, seed=0, **flow | {"cost of a stage": 1}))
    lines = experiments.table(rows, 9).splitlines()
    assert lines[2] == "| the teacher, DDIM | 32 | 64 |  |  | 8.00 | 1.00 | 50.00 | 50.0% | 25.0% | 90.0% |  | 10.05 |"
    i = "| **ProReflow-I**: 8, then 4 windows | 4 | 8 | 2.00 M | 2 | 12.00 ± 2.83 | 1.50 | 50.00 ± 0.00 "
    assert lines[3] == i + "| 50.0% ± 0.0% | 25.0% ± 0.0% |  |  | 11.16 / 22.97 |" and len(lines) == 4
    assert {line.count("|") for line in lines} == {14}


def test_without_the_teachers_row_there_is_no_table():
    with pytest.raises(experiments.InputError, match="python experiments.py --methods ddim"):
        experiments.table([row("ddim", 4, 8.0)], 9)


def test_the_readme_shows_what_was_measured():
    rows = experiments.of_one_teacher(experiments.figures.kept(experiments.ROOT / "docs/results/experiments.json"))
    readme = (experiments.ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.split(experiments.MARKS[0])[1].split(experiments.MARKS[1])[0]
    assert shown == experiments.table(rows, experiments.COST)


def test_a_table_is_of_one_teacher_the_last():
    rows = [row("ddim", 32, 8.0, teacher="old"), row("i", 4, 10.0, teacher="old"), row("ddim", 32, 6.0, teacher="new")]
    assert experiments.of_one_teacher(rows) == rows[2:]
    assert experiments.of_one_teacher(rows[:2]) == rows[:2]


def test_the_cost_of_a_distance_lies_between_those_measured():
    points = {100: 10.0, 400: 6.0, 1600: 7.0}
    assert experiments.cost_to_reach(8.0, points) == pytest.approx(200)  # half of the way, in the logarithm
    assert experiments.cost_to_reach(6.0, points) == pytest.approx(400)
    assert experiments.cost_to_reach(12.0, points) == 100 and experiments.cost_to_reach(5.9, points) is None


def test_below_the_table_stands_what_it_costs_to_be_as_good_as_perflow():
    at = [{"cost of a stage": 10 * n, "training": n * 1_000_000, "seed": 0} for n in (1, 2, 4)]
    rows = [row("perflow", 4, distance, **cost) for distance, cost in zip((9.0, 8.0, 7.0), at)]
    rows += [row("ddim", 32, 5.0), row("i", 4, 7.0, **at[0]), row("i", 4, 6.0, **at[1])]
    rows.append(row("perflow", 4, 1.0, **at[1] | {"seed": 1}))  # a seed that no other cost has
    by_perflow = "With the same seeds, PeRFlow's distance of 7.00 at this cost is reached by PeRFlow at 4.00 M"
    assert experiments.reached(rows, 40).strip() == f"{by_perflow} and by ProReflow-I at 1.00 M evaluations."
    rows[4:] = [row("i", 4, 9.0, **cost) for cost in at]
    assert experiments.reached(rows, 40).endswith("and by ProReflow-I not up to 4.00 M evaluations.\n")
    assert experiments.reached(rows[2:], 40) == ""


def test_the_curve_of_cost_is_drawn(tmp_path):
    rows = [row(name, 4, 9.0, training=cost, seed=0) for name in ("perflow", "i") for cost in (1e6, 2e6)]
    experiments.curve(rows, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_figure_4_has_all_alphas_at_both_numbers_of_windows(tmp_path):
    methods = METHODS | experiments.FIGURE_4
    told = {(name.split("-")[0], method.stages[-1].alpha) for name, method in experiments.FIGURE_4.items()}
    assert told == {("eight", a) for a in (0, 0.01, 0.1, 1, 10)} | {("four", a) for a in (0.01, 1, 10)}
    at = {"cost of a stage": 9, "training": 9, "seed": 0}
    rows = [row(name, 8 if "eight" in name else 4, 9.0, **at) for name in methods if name != "one"]
    experiments.over_alpha(rows, 9, tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").stat().st_size > 1000
