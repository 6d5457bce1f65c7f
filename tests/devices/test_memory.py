"""A device's memory: life of frames, refusals, lazy clearing, reverse map."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hmmnet.devices.memory import IDLE_ROUNDS, Memory
from hmmnet.errors import ProtocolError
from hmmnet.pages import PAGE_SIZE, ZONE_SHIFT, Words, to_wire

ZONE = 70
BASE = ZONE << ZONE_SHIFT


def granted(memory: Memory, count: int) -> Words:
    frames = memory.grant(count)
    assert frames is not None
    return frames


def fill(memory: Memory, frames: Words, value: int) -> None:
    for frame in frames.tolist():
        memory.page_bytes(frame)[:] = value


@pytest.fixture
def memory() -> Memory:
    return Memory(ZONE, 256)


def test_frames_go_round(memory: Memory) -> None:
    """Granted, kept, freed: the counts follow, and the frames can be had again."""
    frames = granted(memory, 10)
    assert (memory.used_pages, memory.free_pages) == (10, 246)
    memory.keep(frames[:6])
    memory.give_back(frames[6:])
    assert memory.used_pages == 6
    assert memory.live_frames().tolist() == frames[:6].tolist()
    memory.free(to_wire(frames[:6]))
    assert (memory.used_pages, memory.free_pages, memory.used_max) == (0, 256, 10)
    assert len(granted(memory, 256)) == 256
    assert memory.grant(1) is None


def test_frames_are_in_one_run(memory: Memory) -> None:
    """A grant from fresh memory is consecutive, so page data move as one slice."""
    assert granted(memory, 20).tolist() == list(range(BASE, BASE + 20))


def test_zeroing_is_lazy_and_right(memory: Memory) -> None:
    """A frame that held data reads zero when a migration wants it zeroed; a fresh one is not touched at all."""
    frames = granted(memory, 4)
    memory.keep(frames)
    fill(memory, frames, 0xAB)
    memory.free(to_wire(frames))
    again = granted(memory, 4)
    assert again.tolist() == frames.tolist()
    assert memory.page_bytes(int(again[0]))[0] == 0xAB
    memory.landing(b"", to_wire(again))
    assert not any(memory.page_bytes(frame).any() for frame in again.tolist())


def test_a_frame_that_data_landed_in_is_dirty_even_if_unused(memory: Memory) -> None:
    """A copy that landed in frames which then were given back must not show through as zeros later."""
    frames = granted(memory, 2)
    memory.landing(to_wire(frames), b"")
    fill(memory, frames, 7)
    memory.give_back(frames)
    again = granted(memory, 2)
    memory.landing(b"", to_wire(again))
    assert not memory.page_bytes(int(again[0])).any()


def idle(memory: Memory) -> int:
    """Let all freed frames become idle, and discard them."""
    for _ in range(IDLE_ROUNDS):
        memory.grow_older()
    return memory.discard_idle()


def test_idle_memory_goes_back_and_is_clean(memory: Memory) -> None:
    """Long freed runs are given to the operating system and read zero; short ones are cleared when wanted."""
    frames = granted(memory, 32)
    memory.keep(frames)
    fill(memory, frames, 1)
    memory.free(to_wire(frames))
    assert idle(memory) == 32
    assert not memory.has_freed
    assert not memory.page_bytes(int(frames[5])).any()
    lone = granted(memory, 1)
    memory.keep(lone)
    fill(memory, lone, 2)
    memory.free(to_wire(lone))
    assert idle(memory) == 0
    again = granted(memory, 1)
    memory.landing(b"", to_wire(again))
    assert not memory.page_bytes(int(again[0])).any()


def test_reused_frames_are_not_discarded(memory: Memory) -> None:
    """Frames that were granted again before the pass keep their bytes."""
    frames = granted(memory, 32)
    memory.keep(frames)
    memory.free(to_wire(frames))
    again = granted(memory, 32)
    memory.keep(again)
    fill(memory, again, 9)
    assert idle(memory) == 0
    assert memory.page_bytes(int(again[31]))[100] == 9


def test_frames_freed_lately_are_not_discarded(memory: Memory) -> None:
    """Not before their time, and not with the batch that they were freed in the time before."""
    frames = granted(memory, 32)
    memory.keep(frames)
    memory.free(to_wire(frames))
    memory.grow_older()
    assert not memory.has_idle
    assert memory.discard_idle() == 0
    memory.keep(granted(memory, 16))
    fill(memory, frames, 3)
    memory.free(to_wire(frames[:16]))
    for _ in range(IDLE_ROUNDS - 1):
        memory.grow_older()
    assert memory.discard_idle() == 16
    assert [memory.page_bytes(frame).any() for frame in frames.tolist()] == [True] * 16 + [False] * 16
    memory.grow_older()
    assert memory.discard_idle() == 16


@pytest.mark.parametrize("offset", [-1, 256, 1 << 40])
def test_foreign_frames_are_refused(memory: Memory, offset: int) -> None:
    """Frames of another zone are named in the refusal."""
    raw = to_wire(np.array([BASE + offset], dtype=np.uint64))
    named = f"0x{BASE + offset:x}"
    with pytest.raises(ProtocolError, match=named):
        memory.landing(raw, b"")
    with pytest.raises(ProtocolError, match=named):
        memory.depart(raw, "CopyOut")
    with pytest.raises(ProtocolError, match=named):
        memory.depart_one(BASE + offset, "CopyOut")
    with pytest.raises(ProtocolError, match=named):
        memory.free(raw)


def test_states_are_checked(memory: Memory) -> None:
    """Copies land in granted frames only; only live frames leave or are freed, and only once."""
    frames = granted(memory, 2)
    with pytest.raises(ProtocolError):
        memory.depart(to_wire(frames), "CopyOut")
    with pytest.raises(ProtocolError):
        memory.depart_one(int(frames[0]), "CopyOut")
    with pytest.raises(ProtocolError):
        memory.free(to_wire(frames))
    memory.keep(frames)
    with pytest.raises(ProtocolError):
        memory.landing(to_wire(frames), b"")
    with pytest.raises(ProtocolError, match="twice"):
        memory.free(to_wire(np.repeat(frames[:1], 2)))
    memory.free(to_wire(frames))
    with pytest.raises(ProtocolError):
        memory.free(to_wire(frames))


def test_half_a_word_is_refused(memory: Memory) -> None:
    """A frame list of 12 bytes is none."""
    with pytest.raises(ProtocolError, match="12 bytes"):
        memory.free(bytes(12))


def test_what_was_asked_before_a_copy_out_is_stale(memory: Memory) -> None:
    """Words asked for earlier are not good, later ones are: the page may have stayed. A freed frame is nobody's."""
    frames = granted(memory, 4)
    memory.keep(frames)
    before = memory.departures
    memory.depart(to_wire(frames[:2]), "CopyOut")
    memory.depart_one(int(frames[2]), "CopyOut")
    assert memory.stays(frames, before).tolist() == [False, False, False, True]
    assert memory.stays(frames, memory.departures).all()
    memory.free(to_wire(frames[:1]))
    assert memory.stays(frames, memory.departures).tolist() == [False, True, True, True]


def test_a_frame_used_again_does_not_make_old_words_good(memory: Memory) -> None:
    """Copied out, freed, granted and filled anew: words from before the copy still mean the old page."""
    frames = granted(memory, 1)
    memory.keep(frames)
    before = memory.departures
    memory.depart_one(int(frames[0]), "CopyOut")
    memory.free(to_wire(frames))
    again = granted(memory, 1)
    memory.keep(again)
    assert again.tolist() == frames.tolist()
    assert not memory.stays(again, before).any()


def test_reverse_map_finds_every_mapping(memory: Memory) -> None:
    """A frame mapped in two mirrors is found in both; freeing forgets."""
    frames = granted(memory, 3)
    memory.keep(frames)
    memory.note_mapping(1, np.array([100, 101, 102], dtype=np.uint64), frames)
    memory.note_mapping(2, np.array([200], dtype=np.uint64), frames[1:2])
    found = {slot: pages.tolist() for slot, pages in memory.mappings(np.sort(frames))}
    assert found == {1: [100, 102, 101], 2: [200]}
    memory.free(to_wire(frames))
    assert memory.mappings(frames) == []


def test_huge_memory_costs_nothing_until_used() -> None:
    """A device of 64 GiB is made at once."""
    memory = Memory(ZONE, 64 << 30 >> 12)
    frames = granted(memory, 1)
    memory.page_bytes(int(frames[0]))[:] = 1
    assert memory.arena.bytes.nbytes == 64 << 30
    assert len(memory.page_bytes(int(frames[0]))) == PAGE_SIZE


def freed_by(memory: Memory, named: bytes) -> list[int]:
    """The frames that are free now, which were told before; none where the list was refused."""
    told: list[int] = []
    try:
        assert memory.free(named, lambda frames: told.extend(frames.tolist())).tolist() == told
    except ProtocolError:
        assert told == []
    return told


@pytest.mark.parametrize("seed", range(20))
def test_a_run_is_freed_as_any_frames_are(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of live frames, as what comes home leaves behind, have a shorter way: the same states, mappings, refusals and next grants."""
    draw = random.Random(seed)
    short, long = Memory(ZONE, 256), Memory(ZONE, 256)
    monkeypatch.setattr(long, "_live_run", lambda _: None)
    taken = 0

    def run(raw: bytes) -> slice | None:
        nonlocal taken
        found = Memory._live_run(short, raw)
        taken += found is not None
        return found

    monkeypatch.setattr(short, "_live_run", run)
    live: list[int] = []
    for _ in range(120):
        count = draw.randrange(1, 12)
        if draw.random() < 0.5:
            frames = [memory.grant(count) for memory in (short, long)]
            assert (frames[0] is None) == (frames[1] is None)
            if frames[0] is not None and frames[1] is not None:
                assert frames[0].tolist() == frames[1].tolist()
                slots = draw.sample((1, 2, 3), draw.randrange(3))
                for memory in (short, long):
                    memory.keep(frames[0])
                    for slot in slots:
                        memory.note_mapping(slot, frames[0] - np.uint64(BASE - 1000 * slot), frames[0])
                live += frames[0].tolist()
        else:
            start = draw.choice(live) if live and draw.random() < 0.9 else BASE + draw.randrange(-4, 256)
            named = to_wire(np.arange(start, start + count, dtype=np.uint64))
            freed = freed_by(short, named)
            assert freed == freed_by(long, named)
            if freed:
                live = [frame for frame in live if frame not in freed]
                short.grow_older()
                long.grow_older()
        assert short.live_frames().tolist() == long.live_frames().tolist() == sorted(live)
        for frame in live:
            assert short.mappings_one(frame) == long.mappings_one(frame)
        assert (short.free_pages, short.has_idle, short.has_freed) == (long.free_pages, long.has_idle, long.has_freed)
    assert taken > 20
