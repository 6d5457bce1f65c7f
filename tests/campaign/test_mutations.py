"""Bugs planted into our own code: each is caught by the campaign, with the seed that is written here.

`python -m tests.campaign.mutations NAME` looks for the first seed again, when the code has moved on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from hmmnet.campaign.crew import Violation
from hmmnet.campaign.draw import draw
from hmmnet.campaign.scenarios import SCENARIOS
from hmmnet.campaign.trial import run_program

from . import slips
from .mutations import MUTATIONS, SEEDS_MAX, caught

CAUGHT: dict[str, tuple[int, str]] = {
    "acknowledged_early": (49, "service"),
    "acknowledgement_not_awaited": (0, "invariants"),
    "additions_are_not_atomic": (0, "history"),
    "additions_are_repeated": (1, "history"),
    "answers_go_to_the_oldest_request": (0, "service"),
    "charge_not_given_back": (9, "invariants"),
    "charges_stay_behind": (9, "invariants"),
    "checksums_are_not_checked": (43, "history"),
    "children_are_not_wiped": (0, "history"),
    "children_have_what_is_not_theirs": (0, "rights"),
    "clear_is_not_told": (2, "rights"),
    "coherent_memory_dies_untold": (92, "invariants"),
    "copies_home_are_zero": (0, "history"),
    "copy_on_write_copies_nothing": (0, "history"),
    "copy_on_write_not_broken": (0, "history"),
    "credits_count_twice": (43, "history"),
    "damaged_chunks_count_as_landed": (43, "history"),
    "dma_of_its_own_is_not_awaited": (44, "service"),
    "entries_stay_when_pages_leave": (0, "invariants"),
    "fork_is_not_told": (0, "invariants"),
    "fork_shares_what_must_be_copied": (3, "invariants"),
    "frames_are_not_zeroed": (0, "history"),
    "frames_for_home_leak": (94, "invariants"),
    "frames_stay_offered": (0, "service"),
    "gaps_are_passed_over": (10, "crash"),
    "granted_frames_leak": (0, "leaks"),
    "heartbeats_do_not_renew_the_lease": (0, "service"),
    "hidden_entries_come_back_though_dropped": (28, "service"),
    "invalidation_drops_nothing": (0, "invariants"),
    "jobs_never_answer_after_a_fault": (0, "crash"),
    "lost_memory_reads_as_zero": (1, "service"),
    "migration_entry_not_restored": (1, "crash"),
    "migration_gives_the_right_to_write": (1, "invariants"),
    "migration_is_not_told": (3, "crash"),
    "moved_mapping_is_empty": (6, "invariants"),
    "moved_pages_are_not_held": (0, "invariants"),
    "never_touched_pages_are_not_zeroed": (0, "history"),
    "one_subscriber_is_forgotten": (0, "invariants"),
    "pages_not_unpinned": (1, "invariants"),
    "pages_of_others_are_readable": (0, "service"),
    "partial_success_ignored": (0, "rights"),
    "peers_copy_nothing": (13, "history"),
    "pin_check_skipped": (33, "service"),
    "poison_is_not_told": (120, "rights"),
    "protection_changes_nothing": (8, "invariants"),
    "protection_is_not_told": (29, "invariants"),
    "punched_pages_stay_mapped": (2, "rights"),
    "read_pages_are_not_held": (0, "invariants"),
    "reference_not_dropped": (0, "invariants"),
    "removed_subscribers_are_told": (0, "invariants"),
    "repeats_take_effect_twice": (17, "service"),
    "retry_check_skipped_by_the_device": (14, "invariants"),
    "revoke_forgotten": (0, "invariants"),
    "revoke_forgotten_after_migration": (1, "invariants"),
    "soft_dirty_is_lost_on_the_way": (5, "history"),
    "swap_slots_are_never_free": (36, "invariants"),
    "swap_slots_are_not_counted": (36, "invariants"),
    "swapped_pages_are_lost": (14, "crash"),
    "unmap_is_not_told": (0, "invariants"),
    "waiters_not_woken": (1, "crash"),
    "who_is_not_told_does_not_read_again": (62, "invariants"),
    "writing_needs_no_right": (1, "service"),
    "zapped_entries_stay": (0, "invariants"),
}
"""Mutation: seed of the standard campaign, and the checker that complains first."""


@cache
def complaints(seed: int) -> list[Violation]:
    """Of a seed without any planted bug."""
    return run_program(draw(seed)).violations


@pytest.mark.parametrize("name", CAUGHT)
def test_a_planted_bug_is_caught(name: str) -> None:
    """By the checker that is named, and the seed is well without the bug."""
    seed, checker = CAUGHT[name]
    assert seed < SEEDS_MAX
    assert complaints(seed) == []
    assert caught(name, seed) == checker, f"python -m tests.campaign.mutations {name} looks for a seed"


BY_SCENARIO = {
    "departures_are_not_counted": "departed",
    "frames_leave_in_their_own_order": "order",
    "lease_ignored_by_the_device": "silence",
    "moved_pages_are_mapped_though_dropped": "dropped",
    "pages_are_written_while_they_leave": "written",
    "retry_check_skipped_by_the_host": "stale",
    "streams_are_over_before_their_last_chunk": "huge",
    "streams_land_after_they_were_given_up": "late",
    "turns_are_not_taken": "turns",
}
"""Mutation: the scenario of the sweep that shows it, without any further fault. (Seeds show the second, too, but seldom.)"""


@pytest.mark.parametrize("name", BY_SCENARIO)
def test_a_planted_bug_is_caught_by_a_scenario(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is well without it."""
    program = SCENARIOS[BY_SCENARIO[name]]
    assert run_program(program).violations == []
    MUTATIONS[name](monkeypatch)
    assert run_program(program).violations


NOT_CAUGHT = {
    "leases_are_not_waited_out": 0,
    "pages_on_their_way_are_not_suspended": 0,
    "translations_stay_suspended": 0,
}
"""Mutation that nobody sees (`slips.UNSEEN`): a seed that comes by it all the same."""


@pytest.mark.parametrize("name", NOT_CAUGHT)
def test_what_is_said_not_to_be_seen_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the run comes by what was planted; once it is seen it belongs into `CAUGHT`."""
    MUTATIONS[name](monkeypatch)
    walked = 0

    def counted(planted: Callable[..., Any]) -> Callable[..., Any]:
        def count(*more: Any, **named: Any) -> Any:
            nonlocal walked
            walked += 1
            return planted(*more, **named)

        return count

    for target, attribute, _ in list(monkeypatch._setattr):
        monkeypatch.setattr(target, attribute, counted(getattr(target, attribute)))
    assert run_program(draw(NOT_CAUGHT[name], "all")).violations == []
    assert walked


def test_enough_are_planted() -> None:
    """At least twenty-five, each by its name."""
    assert len(CAUGHT) >= 25
    assert {*CAUGHT, *BY_SCENARIO} <= set(MUTATIONS)
    own = {name for name, planted in MUTATIONS.items() if planted.__module__ == slips.__name__}
    assert own <= {*CAUGHT, *BY_SCENARIO, *NOT_CAUGHT}
    assert {*NOT_CAUGHT} == {*slips.UNSEEN}
    assert not {*NOT_CAUGHT} & {*CAUGHT, *BY_SCENARIO}
