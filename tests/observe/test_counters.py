"""Counters keep count, size and time in constant space, by kind and device."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.observe.counters import CPU_FAULT, DEVICE_TO_HOST, GPU_FAULT_GROUP, HOST_TO_DEVICE, KINDS, Counter, Profile

RECORDS = st.lists(
    st.tuples(st.sampled_from([*KINDS, "retries"]), st.integers(0, 1 << 30), st.integers(0, 99), st.sampled_from(["", "gpu0", "gpu1"])),
    max_size=30,
)


def profile_of(records: list[tuple[str, int, int, str]]) -> Profile:
    profile = Profile()
    for kind, nbytes, seconds, device in records:
        profile.record(kind, nbytes, float(seconds), device)
    return profile


@given(RECORDS)
def test_against_plain_lists(records: list[tuple[str, int, int, str]]) -> None:
    """Five numbers say what a list would, for one device and for all."""
    profile = profile_of(records)
    for kind in {record[0] for record in records}:
        for device in (None, "", "gpu0"):
            sizes = [nbytes for k, nbytes, _, d in records if k == kind and device in (None, d)]
            times = [seconds for k, _, seconds, d in records if k == kind and device in (None, d)]
            counter = profile.counter(kind, device)
            expected = (len(sizes), sum(sizes), min(sizes, default=0), max(sizes, default=0), float(sum(times)))
            assert (counter.count, counter.total_bytes, counter.min_bytes, counter.max_bytes, counter.seconds) == expected
            assert counter.mean_bytes == (sum(sizes) / len(sizes) if sizes else 0.0)


@given(RECORDS, RECORDS)
def test_merged_is_recorded_together(one: list[tuple[str, int, int, str]], other: list[tuple[str, int, int, str]]) -> None:
    """Profiles of several processes add up; a copy is apart from its original."""
    merged = profile_of(one)
    before = merged.copy()
    merged.merge(profile_of(other))
    together = profile_of(one + other)
    assert sorted(map(json.dumps, merged.as_json())) == sorted(map(json.dumps, together.as_json()))
    assert before.as_json() == profile_of(one).as_json()


@given(RECORDS)
def test_survives_json(records: list[tuple[str, int, int, str]]) -> None:
    """What a host reports, a client reads."""
    profile = profile_of(records)
    assert Profile.from_json(json.loads(json.dumps(profile.as_json()))).as_json() == profile.as_json()


def test_kinds_in_the_profilers_order() -> None:
    """The profiler's first, others as they came."""
    profile = Profile()
    for kind in ("zebra", GPU_FAULT_GROUP, HOST_TO_DEVICE, "ant"):
        profile.record(kind, 1, 0.0, "gpu1")
    profile.record(HOST_TO_DEVICE, 1, 0.0, "gpu0")
    assert profile.kinds() == (HOST_TO_DEVICE, GPU_FAULT_GROUP, "zebra", "ant")
    assert profile.devices() == ("gpu0", "gpu1")
    assert [(kind, device) for kind, device, _ in profile.items()][:2] == [(HOST_TO_DEVICE, "gpu0"), (HOST_TO_DEVICE, "gpu1")]


def test_many_at_once() -> None:
    """Faults serviced together are so many occurrences in one time."""
    profile = Profile()
    profile.record(CPU_FAULT, 40960, 2.0, count=10)
    counter = profile.counter(CPU_FAULT)
    assert (counter.count, counter.total_bytes, counter.min_bytes, counter.max_bytes, counter.seconds) == (10, 40960, 4096, 4096, 2.0)


def test_since() -> None:
    """What one step of a run did."""
    profile = profile_of([(HOST_TO_DEVICE, 10, 1, "gpu0"), (CPU_FAULT, 5, 1, "")])
    earlier = profile.copy()
    profile.record(HOST_TO_DEVICE, 30, 2.0, "gpu0")
    step = profile.since(earlier)
    assert step.kinds() == (HOST_TO_DEVICE,)
    counter = step.counter(HOST_TO_DEVICE, "gpu0")
    assert (counter.count, counter.total_bytes) == (1, 30)
    assert counter.seconds == pytest.approx(2.0)


def test_nothing_was_recorded() -> None:
    """Zero is an answer."""
    profile = Profile()
    assert profile.kinds() == ()
    assert profile.counter(DEVICE_TO_HOST).as_json() == Counter().as_json()
