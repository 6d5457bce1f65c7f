"""What a bad cable does to packets, by itself: which arrive, and when."""

from __future__ import annotations

from random import Random

import pytest

from hmmnet.cable.impairment import QUEUE_BYTES_MAX, Direction, Impairment
from hmmnet.errors import HmmnetError


def direction(bad: Impairment) -> Direction:
    made = Direction(Random(1).random)
    made.impairment = bad
    return made


def test_a_good_cable_does_nothing() -> None:
    """Every packet once, at once."""
    good = direction(Impairment())
    assert [good.arrivals(t / 10, 100) for t in range(3)] == [[0.0], [0.1], [0.2]]
    assert (good.passed, good.dropped) == (3, 0)


def test_loss_and_duplicates_are_as_often_as_asked() -> None:
    """Of 20,000 packets, within five standard deviations."""
    bad = direction(Impairment(loss=0.1, duplicate=0.2))
    copies = [len(bad.arrivals(float(t), 100)) for t in range(20_000)]
    assert abs(copies.count(0) - 2_000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    assert abs(copies.count(2) - 3_600) < 5 * (20_000 * 0.18 * 0.82) ** 0.5
    assert bad.dropped == copies.count(0)


def test_jitter_keeps_the_order_and_reorder_does_not() -> None:
    """A packet that is late holds back those behind it, unless it is the one that is reordered."""
    shaky = direction(Impairment(latency_s=0.01, jitter_s=0.05))
    times = [shaky.arrivals(t / 1000, 100)[0] for t in range(1000)]
    assert times == sorted(times)
    assert min(arrives - t / 1000 for t, arrives in enumerate(times)) >= 0.01
    assert max(arrives - t / 1000 for t, arrives in enumerate(times)) <= 0.06 + 1e-9
    mixed = direction(Impairment(reorder=0.3, reorder_s=0.02))
    times = [mixed.arrivals(t / 1000, 100)[0] for t in range(1000)]
    assert times != sorted(times)


def test_a_rate_is_kept_and_its_queue_ends() -> None:
    """One packet behind the other; what the queue cannot hold is dropped."""
    slow = direction(Impairment(rate_bytes_per_s=1000.0))
    assert [slow.arrivals(0.0, 500)[0] for _ in range(3)] == [0.5, 1.0, 1.5]
    assert slow.arrivals(10.0, 500) == [10.5]
    assert slow.arrivals(10.5, QUEUE_BYTES_MAX + 1) != []
    assert slow.arrivals(10.5, 1) == []


def test_a_cable_that_is_down_passes_nothing() -> None:
    """Whatever else it does."""
    assert direction(Impairment(down=True, duplicate=1.0)).arrivals(0.0, 1) == []


@pytest.mark.parametrize("wrong", [{"loss": 1.5}, {"duplicate": -0.1}, {"latency_s": -1.0}, {"rate_bytes_per_s": -5.0}])
def test_what_no_cable_does_is_refused(wrong: dict[str, float]) -> None:
    """The name of what is wrong is in the message."""
    with pytest.raises(HmmnetError, match=next(iter(wrong))):
        Impairment(**wrong)  # type: ignore[arg-type]  # none of these is `down`
