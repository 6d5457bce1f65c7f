"""The kernel's self-tests on a real machine: all pass, and they fail where what they check does not hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hmmnet.host.mm import fork, huge
from hmmnet.selftest.case import TESTS
from hmmnet.selftest.runner import KINDS, ORDER, Outcome, cases, run_all


def told(_: Outcome) -> None:
    """Nobody watches."""


async def test_all_78_cases_pass() -> None:
    """39 tests on private and on coherent memory, in one go on one machine."""
    outcomes = await run_all(cases(), told)
    assert len(outcomes) == 78
    assert [(o.case, o.why) for o in outcomes if o.result != "pass"] == []
    assert {o.case.kind for o in outcomes} == set(KINDS)
    assert all(o.seconds > 0 for o in outcomes)
    benchmark = next(o for o in outcomes if o.case.name == "benchmark_thp_migration")
    assert len(benchmark.notes) == 10


def test_the_names_are_the_kernels() -> None:
    """39 of them, each with a sentence about what it checks."""
    assert len(ORDER) == 39
    assert set(TESTS) == set(ORDER)
    assert all((test.__doc__ or "").strip().endswith(".") for test in TESTS.values())


def no_huge_page(_mm: object, _vma: object, pages: Any, **_: object) -> Any:
    return np.zeros(len(pages), np.bool_)


def writable_child(*arguments: Any) -> Any:
    """fork that forgets to take the right to write: parent and child share their memory."""
    parent, child, vma, part, where, pages = arguments
    entries = part[where].copy()
    SHARE(parent, child, vma, part, where, pages)
    part[where] = entries
    return entries


SHARE = fork._share


@pytest.mark.parametrize(
    ("module", "name", "broken", "fails"),
    [
        (huge, "populate", no_huge_page, {"migrate_anon_huge_fault"}),
        (huge, "split_entries", lambda *_: None, {"migrate_partial_unmap_fault"}),
        (fork, "_share", writable_child, {"hmm_cow_in_device", "anon_write_child"}),
    ],
)
async def test_they_fail_on_a_broken_machine(module: Any, name: str, broken: Any, fails: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a mistake in it does not pass; the tests that do not meet the mistake do."""
    monkeypatch.setattr(module, name, broken)
    outcomes = await run_all(cases(("open_close", "migrate", *fails), ("private",)), told)
    assert {o.case.name for o in outcomes if o.result == "fail"} == fails
    assert all(o.why for o in outcomes if o.result == "fail")
