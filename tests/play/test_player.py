"""Scripts on a fake process: results are spelled as recorded, failures end where they should."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hmmnet.errors import BusError, KernelError, PeerLost
from hmmnet.play.compare import Tally
from hmmnet.play.operations import OPERATIONS
from hmmnet.play.player import SCRIPT_SECONDS_MAX, MachineBroken, play, prepare
from hmmnet.play.script import Script, parse_scripts, read_scripts
from hmmnet.play.stage import REGION_STRIDE, REGIONS_BASE

DeviceOf = Callable[[int], str]
HAND = Path(__file__).parent.parent / "conformance" / "recordings" / "hand.traces"


def scripted(*lines: str) -> Script:
    """A script from ``OP => RESULT`` lines."""
    pairs = [line.split(" => ") for line in lines]
    text = "\n".join(["=== s", *(p[0] for p in pairs), "--- recorded", *(f"{i}: {p[0]} => {p[1]}" for i, p in enumerate(pairs, 1))])
    return parse_scripts(text, "s.traces")[0]


@pytest.mark.parametrize("name", ["h07-migrate-roundtrip", "h45-close-evicts", "h62-big-range", "h64-zero-npages"])
async def test_recorded_scripts(name: str, process: Any, device_of: DeviceOf) -> None:
    """What the fake can do comes out identical to the recording."""
    script = next(s for s in read_scripts(HAND) if s.name == name)
    outcome = await play(script, prepare(script), process, device_of)
    assert outcome.differences == ()
    assert outcome.identical
    assert process.exited


async def test_regions_lie_where_the_recorder_put_them(process: Any, device_of: DeviceOf) -> None:
    """The k-th region counts even when its call failed; a hole takes a place too."""
    script = scripted("mmap A 0 => ERR EINVAL", "hole H 4 => ok", "mmap B 1 => ok", "write B 0 5 7 => ok")
    assert (await play(script, prepare(script), process, device_of)).identical
    assert set(process.rights) == {(REGIONS_BASE + 2 * REGION_STRIDE) >> 12}


async def test_faults_of_the_cpu(process: Any, device_of: DeviceOf) -> None:
    """SEGV page by page in `sum` and `fill`, which go on with the next page; BUS where the data are gone."""
    script = scripted(
        "mmap A 2 => ok",
        "fill A 0 3 0xfe => SEGV wrote=2 failed=1",
        "sum A 0 3 => [ufe uff SEGV]",
        "read A 1 9 => ok ff",
        "write A 2 0 1 => SEGV",
        "munmap A 0 1 => ok",
        "mprotect A 0 2 r => ERR ENOMEM",
        "sum A 0 2 => [SEGV uff]",
    )
    assert (await play(script, prepare(script), process, device_of)).differences == ()

    async def lost(address: int, length: int) -> bytes:
        raise BusError(address, "its device is gone")

    process.read = lost
    script = scripted("mmap A 1 => ok", "read A 0 0 => BUS", "sum A 0 1 => [BUS]")
    assert (await play(script, prepare(script), process, device_of)).identical


async def test_differences_are_told(process: Any, device_of: DeviceOf) -> None:
    """Every differing line with both results; equal lines are counted."""
    script = scripted("mmap A 1 => ok", "read A 0 0 => ok 11", "sum A 0 1 => [z]")
    outcome = await play(script, prepare(script), process, device_of)
    assert (outcome.lines, outcome.lines_equal) == (3, 2)
    assert not outcome.stopped
    tally = Tally([outcome]).as_json()
    assert tally["differences"] == [
        {"script": "s", "file": "s.traces", "line": 2, "operation": "read A 0 0", "recorded": "ok 11", "got": "ok 00"}
    ]
    assert (tally["scripts"], tally["identical"], tally["lines"], tally["lines_equal"]) == (1, 0, 3, 2)


async def test_a_script_stops_at_what_is_not_built(process: Any, device_of: DeviceOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines up to there are compared; every unbuilt line is counted; one entry says why it stopped."""
    for name in ("mlock", "uffd"):
        monkeypatch.delitem(OPERATIONS, name)
    script = scripted("mmap A 1 => ok", "mlock A 0 1 => ok", "read A 0 0 => ok 00", "uffd A 0 1 => ok", "sum A 0 1 => [z]")
    outcome = await play(script, prepare(script), process, device_of)
    assert outcome.stopped
    assert not outcome.identical
    assert (outcome.lines, outcome.lines_equal) == (5, 1)
    tally = Tally([outcome]).as_json()
    assert tally["unsupported_ops"] == {"mlock": 1, "uffd": 1}
    assert [(d["line"], d["got"], d["why"]) for d in tally["differences"]] == [(2, None, "unsupported operation: mlock")]


async def test_a_child_has_what_its_parent_had(process: Any, device_of: DeviceOf) -> None:
    """Regions and devices by name, each process its own; at the end all processes have ended, the innermost first."""
    script = scripted(
        "mmap A 1 => ok",
        "open d0 0 => ok",
        "fork => child",
        "mmap B 1 => ok",
        "write B 0 0 5 => ok",
        "fork => child",
        "read B 0 0 => ok 05",
        "exit => status 0",
        "dread d0 A 0 1 => ok cpages=1 faults=1 [z]",
        "exit => status 0",
        "mmap C 1 => ok",
        "read C 0 0 => ok 00",
        "fork => child",
    )
    outcome = await play(script, prepare(script), process, device_of)
    assert outcome.differences == ()
    assert process.exited
    assert all(child.exited for child in process.children)
    assert len(process.rights) == 2


async def test_a_trailer_that_tells_of_harm_counts(process: Any, device_of: DeviceOf) -> None:
    """The kernel killed the script; we did not: that is a difference."""
    script = parse_scripts("=== s\nmmap A 1\n--- recorded\n1: mmap A 1 => ok\nEND killed 11\n", "s.traces")[0]
    outcome = await play(script, prepare(script), process, device_of)
    assert not outcome.identical
    assert outcome.differences[0].recorded == "END killed 11"


async def test_a_broken_machine_is_no_result(process: Any, device_of: DeviceOf) -> None:
    """An error that no kernel has ends the script and is handed up with what was played."""

    async def gone(address: int, length: int) -> bytes:
        raise PeerLost("dmirror0 is gone")

    process.read = gone
    script = scripted("mmap A 1 => ok", "read A 0 0 => ok 00", "sum A 0 1 => [z]")
    with pytest.raises(MachineBroken, match="dmirror0 is gone") as caught:
        await play(script, prepare(script), process, device_of)
    assert caught.value.outcome.lines_equal == 1
    assert caught.value.outcome.differences[0].why == "PeerLost: dmirror0 is gone"


async def test_a_script_that_hangs_is_ended(process: Any, device_of: DeviceOf, autojump_clock: trio.testing.MockClock) -> None:
    """After the recorder's own alarm time."""

    async def never(address: int, length: int) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    process.read = never
    script = scripted("mmap A 1 => ok", "read A 0 0 => ok 00")
    with pytest.raises(MachineBroken, match="no answer within 30 s"):
        await play(script, prepare(script), process, device_of)
    assert trio.current_time() >= SCRIPT_SECONDS_MAX


async def test_a_name_given_again_leaves_the_old_handle_open(process: Any, device_of: DeviceOf) -> None:
    """As a C program's file descriptor would be."""
    script = scripted("open d0 0 => ok", "open d0 1 => ok", "open d9 9 => ERR ENOENT", "close d0 => ok", "close d0 => ERR EBADF")
    assert (await play(script, prepare(script), process, device_of)).identical
    assert [handle.device for handle in process.handles.values()] == ["dmirror0"]


def test_errno_names() -> None:
    assert KernelError(errno.ENOENT, "open", "").name == "ENOENT"
