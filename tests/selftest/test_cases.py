"""The kernel's self-tests on a real machine: all pass, and they fail where what they check does not hold."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from hmmnet.host.mm import fork, huge
from hmmnet.play.world import real_world, simulated_world
from hmmnet.selftest import huge as benchmark
from hmmnet.selftest.case import TESTS
from hmmnet.selftest.runner import KINDS, MODERN_ONLY, ORDER, Outcome, cases, run_all
from hmmnet.sim import run_virtual
from hmmnet.topology.model import Personality


def told(_: Outcome) -> None:
    """Nobody watches."""


async def test_all_78_cases_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """39 tests on private and on coherent memory, in one go on one machine; of the benchmark's sizes, the large ones are made smaller."""
    monkeypatch.setattr(benchmark, "BENCHMARK_BLOCKS", tuple(min(blocks, 4) for blocks in benchmark.BENCHMARK_BLOCKS))
    outcomes = await run_all(cases(), told)
    assert len(outcomes) == 78
    assert [(o.case, o.why) for o in outcomes if o.result != "pass"] == []
    assert {o.case.kind for o in outcomes} == set(KINDS)
    assert all(o.seconds > 0 for o in outcomes)
    measured = next(o for o in outcomes if o.case.name == "benchmark_thp_migration")
    assert len(measured.notes) == 10


async def test_v25_keeps_its_own_rules() -> None:
    """The same 39 names; what came later is skipped as such, everything else passes with what v25 does, on both kinds."""
    outcomes = await run_all(cases(), told, personality="v25")
    assert len(outcomes) == 78
    assert {o.personality for o in outcomes} == {"v25"}
    assert [(o.case, o.why) for o in outcomes if o.result == "fail"] == []
    skipped = {(o.case.name, o.case.kind) for o in outcomes if o.result == "skip"}
    numbers = {ORDER.index(name) + 1 for name, _ in skipped if name != "hmm_gup_test"}
    assert numbers == {6, 8, 25, 26, 27, *range(30, 40)}
    assert skipped == {(name, kind) for name in MODERN_ONLY for kind in KINDS} | {("hmm_gup_test", "coherent")}
    assert {o.why for o in outcomes if o.result == "skip"} == {"modern only"}
    assert outcomes[0].as_json() | {"seconds": 0} == {
        "name": "open_close", "kind": "private", "personality": "v25", "result": "pass", "seconds": 0,
    }  # fmt: skip


def test_all_cases_pass_in_virtual_time() -> None:
    """The same host and devices in the other world: the same results."""
    for personality in PERSONALITIES:
        chosen = [case for case in cases() if case.name != "benchmark_thp_migration"]
        outcomes = run_virtual(run_all, chosen, told, partial(simulated_world, personality), personality, seed=3)
        assert [(o.case, o.why) for o in outcomes if o.result == "fail"] == []
        assert len(outcomes) == 76


PERSONALITIES: tuple[Personality, ...] = ("today", "v25")
DIFFER = ("anon_write_hugetlbfs", "migrate_mixed", "mixedmap", "snapshot", "compound")


@pytest.mark.parametrize(("machine", "expected"), [("today", "v25"), ("v25", "today")])
async def test_the_expectations_of_one_fail_on_the_other(machine: Personality, expected: Personality) -> None:
    """Where the two differ, what is checked is not the same: each fails on the other's machine (coherent: a remote page looks the same)."""
    chosen = cases(DIFFER, ("private",))
    outcomes = await run_all(chosen, told, lambda: real_world(machine), expected)
    assert {o.case.name for o in outcomes if o.result == "fail"} == set(DIFFER)


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
