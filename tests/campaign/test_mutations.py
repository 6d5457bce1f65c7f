"""Bugs planted into our own code: each is caught by the campaign, with the seed that is written here.

`python -m tests.campaign.mutations NAME` looks for the first seed again, when the code has moved on.
"""

from __future__ import annotations

import pytest

from .mutations import MUTATIONS, SEEDS_MAX, caught

CAUGHT: dict[str, tuple[int, str]] = {
    "acknowledgement_not_awaited": (0, "invariants"),
    "additions_are_not_atomic": (1, "history"),
    "charge_not_given_back": (17, "invariants"),
    "copies_home_are_zero": (0, "history"),
    "copy_on_write_copies_nothing": (7, "history"),
    "copy_on_write_not_broken": (0, "history"),
    "credits_count_twice": (21, "history"),
    "entries_stay_when_pages_leave": (0, "invariants"),
    "frames_are_not_zeroed": (1, "history"),
    "gaps_are_passed_over": (3, "crash"),
    "granted_frames_leak": (0, "leaks"),
    "invalidation_drops_nothing": (2, "invariants"),
    "jobs_never_answer_after_a_fault": (0, "crash"),
    "migration_entry_not_restored": (16, "crash"),
    "migration_is_not_told": (2, "invariants"),
    "moved_mapping_is_empty": (3, "history"),
    "one_subscriber_is_forgotten": (0, "invariants"),
    "pages_not_unpinned": (3, "invariants"),
    "partial_success_ignored": (0, "history"),
    "protection_changes_nothing": (1, "invariants"),
    "protection_is_not_told": (36, "invariants"),
    "punched_pages_stay_mapped": (11, "history"),
    "reference_not_dropped": (0, "invariants"),
    "removed_subscribers_are_told": (0, "invariants"),
    "repeats_take_effect_twice": (1, "service"),
    "retry_check_skipped_by_the_device": (2, "service"),
    "revoke_forgotten": (0, "invariants"),
    "revoke_forgotten_after_migration": (4, "invariants"),
    "unmap_is_not_told": (0, "invariants"),
    "waiters_not_woken": (0, "crash"),
    "zapped_entries_stay": (0, "history"),
}
"""Mutation: seed of the standard campaign, and the checker that complains first."""


@pytest.mark.parametrize("name", CAUGHT)
def test_a_planted_bug_is_caught(name: str) -> None:
    """By the checker that is named, or at least by one."""
    seed, checker = CAUGHT[name]
    assert seed < SEEDS_MAX
    assert caught(name, seed), f"{checker} has seen it before; python -m tests.campaign.mutations {name}"


def test_enough_are_planted() -> None:
    """At least twenty-five, each by its name."""
    assert len(CAUGHT) >= 25
    assert set(CAUGHT) <= set(MUTATIONS)
