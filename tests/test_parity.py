"""Our networks compute what those of diffusers and transformers compute; the table is printed by tests/parity.py."""

import parity
import pytest
import torch


@pytest.mark.parametrize(
    "module, configuration, run, bound", parity.SMALL, ids=lambda part: part if isinstance(part, str) else ""
)
def test_a_network_equals_the_reference(module, configuration, run, bound):
    assert parity.error_of(run) < bound


def test_the_comparison_notices_a_single_wrong_tensor():
    def run():
        mine, theirs = parity.run_feed_forward()
        return mine + 1e-4 * torch.eye(mine.shape[1], mine.shape[2])[None] * theirs.abs().max(), theirs

    assert parity.error_of(run) > 1e-5
