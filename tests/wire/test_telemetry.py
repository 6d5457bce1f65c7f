"""Samples reach the host on their own socket, newest first; garbage and forgeries do not."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.devices.telemetry import publish
from hmmnet.errors import ProtocolError
from hmmnet.host.telemetry import Telemetry
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.telemetry import Sample, pack_sample, plain_figures, unpack_sample

SECRET = b"s" * 32


def test_samples_survive() -> None:
    """A sample comes back as it was."""
    sample = Sample("gpu0", 64, 3, {"pages_used": 12, "emulated_s": 0.5, "model": "gpu"})
    assert unpack_sample(pack_sample(sample, SECRET), SECRET) == sample


def test_only_plain_figures_travel() -> None:
    """Lists and maps stay behind."""
    assert plain_figures({"a": 1, "b": [1], "c": "x", "d": None}) == {"a": 1, "c": "x"}


@given(st.binary(max_size=300))
def test_garbage_is_refused(message: bytes) -> None:
    """Bytes that nobody with the secret made are no sample."""
    with pytest.raises(ProtocolError):
        unpack_sample(message, SECRET)


def test_a_wrong_secret_and_a_wrong_form_are_refused() -> None:
    """The proof is checked first, the form then."""
    sample = Sample("gpu0", 64, 1, {})
    with pytest.raises(ProtocolError, match="secret"):
        unpack_sample(pack_sample(sample, b"other"), SECRET)
    with pytest.raises(ProtocolError, match="decoded"):
        unpack_sample(pack_sample(Sample("", 64, 1, {}), SECRET), SECRET)


def test_the_newest_sample_of_a_living_device_counts() -> None:
    """Late samples, samples of the dead and garbage change nothing."""
    channel: Any = None
    telemetry = Telemetry(channel, SECRET, {64: object()})
    telemetry.take(pack_sample(Sample("gpu0", 64, 2, {"jobs": 2}), SECRET))
    telemetry.take(pack_sample(Sample("gpu0", 64, 1, {"jobs": 1}), SECRET))
    telemetry.take(pack_sample(Sample("gpu0", 65, 9, {"jobs": 9}), SECRET))
    telemetry.take(b"garbage")
    assert telemetry.figures(64) == {"jobs": 2}
    assert telemetry.figures(65) == {}
    assert telemetry.dropped == 1
    telemetry.forget(64)
    assert telemetry.figures(64) == {}


async def test_a_device_tells_what_changes(autojump_clock: trio.testing.MockClock) -> None:
    """Figures that change are sent, at most once a period; time alone is no news."""
    transport = MemoryTransport()
    reader = transport.bind_telemetry("mem://telemetry")
    figures: dict[str, Any] = {"jobs": 0, "emulated_s": 0.0}
    telemetry = Telemetry(reader, SECRET, {64: object()})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(telemetry.run)
        nursery.start_soon(publish, transport.connect_telemetry("mem://telemetry"), SECRET, "gpu0", 64, lambda: figures, 0.5)
        await trio.sleep(2.2)
        assert telemetry.figures(64)["jobs"] == 0
        assert telemetry._newest[64].number == 1
        figures["jobs"] = 5
        await trio.sleep(1.0)
        assert telemetry.figures(64)["jobs"] == 5
        assert telemetry._newest[64].number == 2
        nursery.cancel_scope.cancel()
    transport.close()


class Script:
    """A channel that gives what is in it, and is closed then."""

    def __init__(self, *messages: tuple[bytes, bytes | None]) -> None:
        self.messages = list(messages)

    async def receive(self) -> tuple[bytes, bytes | None]:
        await trio.lowlevel.checkpoint()
        if not self.messages:
            raise trio.ClosedResourceError
        return self.messages.pop(0)


async def test_samples_have_no_payload_and_reading_ends_with_the_socket(caplog: pytest.LogCaptureFixture) -> None:
    """A message with page data behind it is none of ours; the log says that nothing comes any more, and not each of a flood."""
    good = pack_sample(Sample("gpu0", 64, 1, {"jobs": 5}), SECRET)
    channel: Any = Script((good, b"data"), *[(b"garbage", None)] * 6, (good, None))
    telemetry = Telemetry(channel, SECRET, {64: object()})
    with caplog.at_level("INFO", "hmmnet.host"):
        await telemetry.run()
    assert telemetry.dropped == 7
    assert telemetry.figures(64) == {"jobs": 5}
    assert [record.message.split(" telemetry")[0] for record in caplog.records] == [
        "dropped 2",
        "dropped 4",
        "telemetry has ended: its socket was closed",
    ]
