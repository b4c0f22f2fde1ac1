"""What is measured: the right work on both sides, and ratios that are what they are called."""

import argparse
import json

import pytest
import torch

from support import layouts
from tools import bench


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
    assert bench.peak_ratio({"peak MiB": [64, 192]}) == "0.33" and bench.peak_ratio({"peak MiB": [1, 2]}) == ""


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


# SD1.5 as narrow as it can be, to try what is meant for its full size.
SMALL = {
    "unet": layouts.SD15["unet"] | {"block_out_channels": [32] * 4, "cross_attention_dim": 32, "sample_size": 16},
    "vae": layouts.SD15["vae"] | {"block_out_channels": [32] * 4},
    "text_encoder": layouts.SD15["text_encoder"]
    | {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1},
}


def test_both_pipelines_draw_images_of_the_model_of_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.convert, "SD15", layouts.SD15 | SMALL)
    images, compare = {}, bench.compare

    def drawn(what, sides, *more):
        images.update({side: call() for side, call in sides.items()})
        return compare(what, sides, *more)

    monkeypatch.setattr(bench, "compare", drawn)
    [row] = bench.bench_pipeline(argparse.Namespace(device="cpu", runs=1, work=tmp_path))
    assert row["ratio"] > 0 and images["ours"].shape == images["diffusers"].images.shape == (1, 128, 128, 3)


def test_training_is_measured_in_a_run_of_both_kinds_of_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TRAINED", {"small": (layouts.SD15 | SMALL, 2, 128)})
    rows = bench.bench_train(argparse.Namespace(device="cpu", runs=1, work=tmp_path))
    assert [row["what"].split(",")[1] for row in rows] == [" stage 1", " stage 2"]
    flops = bench.forward_flops(SMALL, 128)
    for row in rows:
        rate, teraflops = row["values"]["evaluations/s"], row["values"]["TFLOP/s"]
        assert rate > 0 and teraflops == pytest.approx(rate * flops / 1e12, rel=0.01)


def test_the_limit_tells_rates_and_shares_of_the_time(monkeypatch):
    monkeypatch.setattr(
        bench.convert, "SD15", layouts.SD15 | SMALL | {"unet": SMALL["unet"] | {"cross_attention_dim": 768}}
    )
    monkeypatch.setattr(bench, "compare", lambda what, sides, *rest: {"ours": 2.0, "theirs": 0.5, "peer": "a product"})
    rates, shares = (row["values"] for row in bench.bench_limit(argparse.Namespace(device="cpu", runs=1)))
    flops = bench.forward_flops(bench.convert.SD15, 512)
    assert list(rates.values()) == [round(flops / 1e9), round(4 * 4096**3 / 1e9)]  # in 2 s two images, in 0.5 s
    assert sum(shares.values()) == pytest.approx(100, abs=0.3)
    assert all(share > 1 for share in shares.values())  # a renamed operation would silently count among all else


def test_a_forward_pass_of_the_official_unets_takes_0_80_and_6_76_tflop():
    counted = [bench.forward_flops(layouts.SD15, 512), bench.forward_flops(layouts.SDXL, 1024)]
    assert counted == pytest.approx([0.803e12, 6.76e12], rel=1e-3)  # the README counts with them


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
