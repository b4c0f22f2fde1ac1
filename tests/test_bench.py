"""What is measured: the right work on both sides, and ratios that are what they are called."""

import argparse
import json

import pytest
import torch

import bench


def test_a_ratio_is_of_medians_and_its_spread_of_single_runs(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    took = {"ours": iter([100, 1, 2, 6]), "peer": iter([100, 4, 4, 8])}  # the first warms up, and does not count

    def side(name):
        def call():
            clock[0] += next(took[name])

        return call

    row = bench.compare("work", {"ours": side("ours"), "peer": side("peer")}, 3, "cpu")
    assert (row["ours"], row["theirs"], row["ratio"], row["spread"]) == (2, 4, 0.5, [0.25, 0.75])
    assert "ratio 0.50 (0.25 to 0.75)" in capsys.readouterr().out


def test_the_peak_is_what_a_call_takes_even_if_it_gives_it_back():
    def takes(mebibytes):
        return lambda: torch.ones(mebibytes * 2**18).sum()

    row = bench.compare("work", {"ours": takes(64), "peer": takes(192)}, 2, "cpu")
    assert row["peak MiB"] == [pytest.approx(64, abs=8), pytest.approx(192, abs=8)]
    assert bench.peak_ratio(row) == "0.33" and bench.peak_ratio({"peak MiB": [1, 2]}) == ""


def test_a_merging_stage_asks_its_teacher_twice_and_perflow_eight_times(monkeypatch):
    calls = []
    loss_of = bench.train.loss_of

    def counted(student, teacher, *rest):
        evaluations = []
        handle = teacher.unet.register_forward_pre_hook(lambda *_: evaluations.append(1))
        result = loss_of(student, teacher, *rest)
        handle.remove()
        calls.append(len(evaluations))
        return result

    monkeypatch.setattr(bench.train, "loss_of", counted)
    monkeypatch.setattr(bench, "compare", lambda what, sides, *rest: [call() for call in sides.values()])
    bench.bench_step(argparse.Namespace(device="cpu", runs=1))
    assert calls == [2, 8]


def test_the_readme_shows_what_was_measured_last():
    readme = (bench.RESULTS.parent.parent / "README.md").read_text(encoding="utf-8")
    assert readme.split(bench.MARKS[0])[1].split(bench.MARKS[1])[0] == bench.table()


@pytest.mark.parametrize("file", sorted(bench.RESULTS.glob("bench-*.json")), ids=lambda file: file.stem)
def test_every_recorded_row_names_machine_versions_and_date(file):
    content = json.loads(file.read_text())
    assert content["date"] and content["cpu"] and set(content["versions"]) >= {"torch", "diffusers"}
    for row in content["rows"]:
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
        assert row["spread"][0] <= row["ratio"] * 1.2 and row["spread"][1] >= row["ratio"] / 1.2
