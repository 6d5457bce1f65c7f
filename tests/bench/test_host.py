"""The host's figures, on small sizes: they are measured, named and judged; how large they are is no matter of tests."""

from __future__ import annotations

import math

from hmmnet.bench.host import BENCHMARKS, BOOKKEEPING_PAGES, FORK_PAGES, OTHERS, SNAPSHOT_PAGES, measure_migration
from hmmnet.host.bookkeeping import SIZES, measure
from hmmnet.pages import PAGE_SIZE


def test_migrations_and_faults_of_a_real_machine() -> None:
    """Five figures, each with its reference from the same run."""
    found = measure_migration(rounds=1, nbytes=512 * PAGE_SIZE, faults=8)
    assert [figure.name for figure in found] == [name for name, measures in BENCHMARKS.items() if measures is measure_migration]
    for figure in found:
        assert figure.value > 0
        assert figure.reference is not None
        assert figure.ratio is not None
        assert math.isfinite(figure.ratio)


def test_the_probe_measures_every_size() -> None:
    """Nanoseconds a page for each figure; the sizes that goals are set for are among those it takes by itself."""
    found = measure((16, 1024))
    measured = {name: sorted(sizes) for name, sizes in found.items()}
    huge = [1024]  # sixteen pages are no huge page
    small = [16, 1024]
    by_page = ("snapshot", "migrate", "fork", *OTHERS, *(f"snapshot_{kind}" for kind in OTHERS))
    assert measured == dict.fromkeys(by_page, small) | dict.fromkeys(("thp", "thp_to_device", "thp_to_host"), huge)
    assert all(figure > 0 for sizes in found.values() for figure in sizes.values())
    assert {BOOKKEEPING_PAGES, FORK_PAGES, SNAPSHOT_PAGES} <= set(SIZES)
