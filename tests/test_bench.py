"""What is measured: the right work on both sides, and ratios that are what they are called."""

import argparse

import pytest
import torch

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


@pytest.fixture
def results(monkeypatch):
    """Of each comparison, what both sides return."""
    monkeypatch.setattr(bench, "compare", lambda what, sides, args: [call() for call in sides.values()])


@pytest.mark.slow
def test_a_merging_stage_asks_its_teacher_twice_and_perflow_eight_times(monkeypatch, results):
    asked, solve = [], bench.train.solve

    def counted(teacher, epsilon, z, grid):
        asked.append(len(grid) - 1)
        return solve(teacher, epsilon, z, grid)

    monkeypatch.setattr(bench.train, "solve", counted)
    bench.bench_step(ARGS)
    assert asked == [2, 8]


# SD1.5 as narrow as it can be, to try what is meant for its full size.
SMALL = {
    "unet": {"block_out_channels": [32] * 4, "cross_attention_dim": 32, "sample_size": 16},
    "vae": {"block_out_channels": [32] * 4},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1},
}
SMALL = layouts.SD15 | {part: layouts.SD15[part] | changes for part, changes in SMALL.items()}


@pytest.mark.slow
def test_both_sides_do_the_same(monkeypatch, results):
    monkeypatch.setattr(bench.layouts, "SD15", SMALL)
    monkeypatch.setattr(bench, "FAMILIES", {"SD1.5": (SMALL, 16)})
    for ours, theirs in bench.bench_networks(ARGS):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)  # bfloat16
    [(ours, theirs)] = bench.bench_pipeline(ARGS)
    assert ours.shape == theirs.images.shape == (1, 128, 128, 3)
