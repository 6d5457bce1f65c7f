"""The fabric's benchmark runs, in small: each figure is measured and judged. What they reach is for `hmmnet bench` to say, not a test."""

from __future__ import annotations

import math

import pytest

from hmmnet.bench.dma import BENCHMARKS, dma_peer, measure_dma, measure_throttle


def test_streams_beside_their_references() -> None:
    """Both directions against processes of their own, each with a ratio of the same run."""
    found = measure_dma(rounds=1, nbytes=(4 << 20) + 4096)
    assert [figure.name for figure in found] == [
        "dma.to_device",
        "dma.to_host",
        "dma.messages_to_device",
        "dma.messages_to_host",
        "dma.vs_unix_to_device",
        "dma.vs_unix_to_host",
    ]
    assert [bool(figure.goal) for figure in found] == [True] * 4 + [False] * 2
    for figure in found:
        assert figure.value > 0
        assert figure.reference is not None
        assert figure.ratio is not None
        assert math.isfinite(figure.ratio)


def test_paces() -> None:
    """One figure for each pace, an error in percent, judged as such."""
    found = measure_throttle(seconds=0.05)
    assert [figure.name for figure in found] == [name for name, function in BENCHMARKS.items() if function is measure_throttle]
    assert all(figure.value >= 0 and figure.ratio is None for figure in found)


def test_a_far_process_that_ends_is_an_error_and_no_hang(tmp_path: object) -> None:
    """What it measures cannot be had."""
    far = dma_peer("unix", f"{tmp_path}/nowhere", 4096)
    with pytest.raises(RuntimeError, match="ended early"):
        far.answer()
    far.close()
