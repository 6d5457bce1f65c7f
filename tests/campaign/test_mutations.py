"""Bugs planted into our own code: each is caught by the campaign, with the seed that is written here.

`python -m tests.campaign.mutations NAME` looks for the first seed again, when the code has moved on.
"""

from __future__ import annotations

import pytest

from .mutations import MUTATIONS, SEEDS_MAX, caught

CAUGHT: dict[str, tuple[int, str]] = {
    "acknowledged_early": (3, "iommu"),
    "acknowledgement_not_awaited": (0, "invariants"),
    "additions_are_not_atomic": (0, "history"),
    "charge_not_given_back": (4, "invariants"),
    "checksums_are_not_checked": (28, "history"),
    "clear_is_not_told": (3, "invariants"),
    "copies_home_are_zero": (1, "history"),
    "copy_on_write_copies_nothing": (2, "history"),
    "copy_on_write_not_broken": (0, "history"),
    "credits_count_twice": (28, "history"),
    "damaged_chunks_count_as_landed": (28, "history"),
    "entries_stay_when_pages_leave": (1, "invariants"),
    "fork_is_not_told": (0, "invariants"),
    "frames_are_not_zeroed": (0, "history"),
    "gaps_are_passed_over": (2, "service"),
    "granted_frames_leak": (0, "leaks"),
    "hidden_entries_come_back_though_dropped": (11, "invariants"),
    "invalidation_drops_nothing": (0, "invariants"),
    "jobs_never_answer_after_a_fault": (0, "crash"),
    "lost_memory_reads_as_zero": (7, "service"),
    "migration_entry_not_restored": (7, "crash"),
    "migration_is_not_told": (0, "invariants"),
    "moved_mapping_is_empty": (1, "history"),
    "one_subscriber_is_forgotten": (0, "invariants"),
    "pages_not_unpinned": (1, "invariants"),
    "partial_success_ignored": (0, "invariants"),
    "pin_check_skipped": (11, "invariants"),
    "protection_changes_nothing": (1, "rights"),
    "protection_is_not_told": (49, "invariants"),
    "punched_pages_stay_mapped": (15, "history"),
    "reference_not_dropped": (0, "invariants"),
    "removed_subscribers_are_told": (0, "invariants"),
    "repeats_take_effect_twice": (87, "service"),
    "retry_check_skipped_by_the_device": (19, "invariants"),
    "revoke_forgotten": (0, "invariants"),
    "revoke_forgotten_after_migration": (1, "invariants"),
    "swapped_pages_are_lost": (24, "history"),
    "unmap_is_not_told": (1, "invariants"),
    "waiters_not_woken": (1, "crash"),
    "writing_needs_no_right": (48, "service"),
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
