"""What is measured: the right work on both sides, and ratios that are what they are called."""

import argparse

import pytest
from diffusers import StableDiffusionPipeline

from support import layouts
from tools import bench

ARGS = argparse.Namespace(device="cpu", runs=3)


def test_a_ratio_is_of_medians_and_its_spread_of_single_runs(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    took = {"ours": iter([100, 1, 2, 6]), "peer": iter([100, 4, 4, 8])}  # the first warms up, and does not count

    def side(name):
        def call():
            clock[0] += next(took[name])

        return call

    row = bench.compare("work", {"ours": side("ours"), "peer": side("peer")}, ARGS)
    assert (row["ours"], row["theirs"], row["ratio"], row["spread"]) == (2, 4, 0.5, [0.25, 0.75])


@pytest.mark.slow
def test_a_merging_stage_asks_its_teacher_twice_and_perflow_eight_times(monkeypatch):
    asked = []
    solve = bench.train.solve

    def counted(teacher, epsilon, z, grid):
        asked.append(0)

        def asking(z, tau):
            asked[-1] += 1
            return epsilon(z, tau)

        return solve(teacher, asking, z, grid)

    monkeypatch.setattr(bench.train, "solve", counted)
    monkeypatch.setattr(bench, "compare", lambda what, sides, args: [call() for call in sides.values()])
    bench.bench_step(ARGS)
    assert asked == [2, 8]


# SD1.5 as narrow as it can be, to try what is meant for its full size.
SMALL = layouts.SD15 | {
    "unet": layouts.SD15["unet"] | {"block_out_channels": [32] * 4, "cross_attention_dim": 32, "sample_size": 16},
    "vae": layouts.SD15["vae"] | {"block_out_channels": [32] * 4},
    "text_encoder": layouts.SD15["text_encoder"]
    | {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1},
}


@pytest.mark.slow
def test_both_pipelines_draw_images_of_the_model_of_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.layouts, "SD15", SMALL)
    monkeypatch.setattr(bench, "compare", lambda what, sides, args: {side: call() for side, call in sides.items()})
    [images] = bench.bench_pipeline(argparse.Namespace(device="cpu", work=tmp_path))
    assert images["ours"].shape == images["diffusers"].images.shape == (1, 128, 128, 3)
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "sd15-float32").tokenizer("a red circle")


@pytest.mark.slow
def test_training_is_measured_in_a_run_of_both_kinds_of_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FAMILIES", {"small": (SMALL, 16)})
    monkeypatch.setattr(bench, "TRAINED", {"small": 2})
    rows = bench.bench_train(argparse.Namespace(device="cpu", runs=1, work=tmp_path))
    assert [row["what"].split(",")[1] for row in rows] == [" stage 1", " stage 2"]
    for row in rows:
        assert row["TFLOP/s"] == pytest.approx(row["NFE/s"] * bench.forward_flops(SMALL, 16) / 1e12, abs=0.002)


@pytest.mark.slow
def test_a_forward_pass_of_the_official_unets_takes_0_80_and_6_76_tflop():
    counted = [bench.forward_flops(layouts.SD15, 64), bench.forward_flops(layouts.SDXL, 128)]
    assert counted == pytest.approx([0.803e12, 6.76e12], rel=1e-3)
