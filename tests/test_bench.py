"""What is measured: the right work on both sides, and ratios that are what they are called."""

import pytest
import torch

from support import official
from tools import bench


def test_a_ratio_is_of_medians_and_its_spread_of_single_runs(monkeypatch):
    monkeypatch.setattr(bench, "RUNS", 3)
    ticks = [0, 0, 0, 1, 0, 4, 0, 2, 0, 4, 0, 6, 0, 8]  # starts and ends, in turns; first both sides warm up
    monkeypatch.setattr(bench.time, "perf_counter", iter(ticks).__next__)
    row = bench.compare("work", "peer", lambda: None, lambda: None, "cpu")
    assert (row["ours"], row["theirs"], row["ratio"], row["spread"]) == (2, 4, 0.5, [0.25, 0.75])


@pytest.fixture
def results(monkeypatch):
    """Of each comparison, what both sides return."""
    monkeypatch.setattr(bench, "compare", lambda what, peer, ours, theirs, device: (ours(), theirs()))


@pytest.mark.slow
def test_a_merging_stage_asks_its_teacher_twice_and_perflow_eight_times(monkeypatch, results):
    asked, solve = [], bench.train.solve
    monkeypatch.setattr(bench.train, "solve", lambda *given: asked.append(len(given[3]) - 1) or solve(*given))
    bench.bench_step("cpu")
    assert asked == [2, 8]


# SD1.5 as narrow as it can be, to try what is meant for its full size.
SMALL = {
    "unet": {"block_out_channels": [32] * 4, "cross_attention_dim": 32, "sample_size": 16},
    "vae": {"block_out_channels": [32] * 4},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1},
}
SMALL = official.SD15 | {part: official.SD15[part] | changes for part, changes in SMALL.items()}


@pytest.mark.slow
def test_both_sides_do_the_same(monkeypatch, results):
    monkeypatch.setattr(bench.official, "SD15", SMALL)
    monkeypatch.setattr(bench, "FAMILIES", {"SD1.5": (SMALL, 16)})
    for ours, [theirs] in bench.bench_networks("cpu"):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)  # bfloat16
    [(ours, theirs)] = bench.bench_pipeline("cpu")
    assert ours.shape == theirs.images.shape == (1, 128, 128, 3)
