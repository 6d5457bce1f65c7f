"""Hello and goodbye, over sockets and in memory: who gets in, who is refused, and that a stranger leaves nothing behind."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hmmnet.errors import PeerGone, PeerLost, PeerRefused
from hmmnet.wire.client import connect
from hmmnet.wire.codec import MAGIC, Kind, decode_body, decode_header, encode
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.messages import PROTOCOL_VERSION, CloseContext, Done, Hello, Inspect, Message, MigrateDone, Refused, Report, Welcome
from hmmnet.wire.server import Server
from hmmnet.wire.session import Session
from hmmnet.wire.transport import Transport
from hmmnet.wire.zmq_transport import ZmqTransport

SECRET = b"s" * 32
BOUND_S = 20
WELCOME = Welcome(PROTOCOL_VERSION, 77, 64, [], "", "", b"", "", 0.0, 0.0, 1.0, 2.0, b"")


def hello(name: str = "gpu0", incarnation: int = 1, role: str = "device", version: int = PROTOCOL_VERSION, secret: bytes = SECRET) -> Hello:
    return Hello(version, role, name, incarnation, 1, secret)


class Machine:
    """A server that knows which sessions joined and ended, and answers `Inspect`."""

    def __init__(self, transport: Transport, endpoint: str, **times: float) -> None:
        self.joined: list[Session] = []
        self.lost: list[PeerLost] = []
        self.decide: Callable[[Hello], Welcome | Refused] = lambda _: WELCOME
        self.transport = transport
        self.server = Server(transport.listen(endpoint), SECRET, self.on_hello, self.on_joined, **times)
        self.endpoint = self.server.listener.endpoint

    def on_hello(self, greeting: Hello) -> Welcome | Refused:
        return self.decide(greeting)

    def on_joined(self, session: Session, _: Hello) -> None:
        self.joined.append(session)
        session.on_lost(self.lost.append)
        session.on(Inspect, lambda _: Report(session.peer_name.encode()))

    @property
    def idle(self) -> bool:
        """No state of any peer."""
        return not (self.server.sessions or self.server._by_address or self.server._by_name)


@asynccontextmanager
async def running(machine: Machine) -> AsyncIterator[Machine]:
    async with trio.open_nursery() as nursery:
        await nursery.start(machine.server.run)
        with trio.fail_after(BOUND_S):
            yield machine
        nursery.cancel_scope.cancel()


@pytest.fixture(params=["ipc", "tcp", "memory"])
def machine(request: pytest.FixtureRequest, place: str) -> Iterator[Callable[..., Machine]]:
    """Makes a machine over one of the transports."""
    endpoint = {"ipc": f"ipc://{place}/control", "tcp": "tcp://127.0.0.1:*", "memory": "mem://control"}[request.param]
    transport: Transport = MemoryTransport() if request.param == "memory" else ZmqTransport()
    yield lambda **times: Machine(transport, endpoint, **times)
    transport.close()


async def test_a_peer_joins_and_leaves(machine: Callable[..., Machine]) -> None:
    """Hello, welcome, requests in both directions, goodbye; the server keeps nothing."""
    async with running(machine()) as host:
        async with connect(host.transport, host.endpoint, hello()) as (session, welcome):
            assert welcome == WELCOME
            assert (session.peer_name, session.role, session.incarnation) == ("host", "host", 77)
            session.on(CloseContext, lambda _: None)
            assert await session.request(Inspect()) == Report(b"gpu0")
            [peer] = host.server.sessions
            assert (peer.peer_name, peer.role, peer.incarnation) == ("gpu0", "device", 1)
            assert await peer.request(CloseContext(1)) == Done()
        assert isinstance(host.lost[0], PeerGone)
        assert host.idle


async def test_an_error_in_the_block_comes_out_as_it_is(machine: Callable[..., Machine]) -> None:
    """Not wrapped in a group; and the goodbye is said all the same."""
    async with running(machine()) as host:
        with pytest.raises(KeyError, match="mine"):
            async with connect(host.transport, host.endpoint, hello()):
                raise KeyError("mine")
        assert isinstance(host.lost[0], PeerGone)


@pytest.mark.parametrize("machine", ["ipc", "tcp"], indirect=True)
async def test_who_is_cancelled_hears_the_answer_to_its_goodbye(machine: Callable[..., Machine]) -> None:
    """Nobody who presses Ctrl-C waits for a host that has answered long ago."""
    async with running(machine()) as host:
        with trio.CancelScope() as scope:
            async with connect(host.transport, host.endpoint, hello()) as (session, _):
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert isinstance(session.lost, PeerGone)
        assert isinstance(host.lost[0], PeerGone)


async def test_the_host_says_goodbye_to_all(machine: Callable[..., Machine]) -> None:
    """Each peer hears it once, and the host waits for all of them at once."""
    heard: list[PeerLost] = []
    async with running(machine()) as host, AsyncExitStack() as stack:
        for i in range(4):
            session, _ = await stack.enter_async_context(connect(host.transport, host.endpoint, hello(f"gpu{i}")))
            session.on_lost(heard.append)
        await host.server.bye()
        assert host.idle
        with trio.move_on_after(5):
            while len(heard) < 4:
                await trio.sleep(0.001)
    assert all(isinstance(cause, PeerGone) for cause in heard)


async def test_requests_before_the_first_await_are_served(machine: Callable[..., Machine]) -> None:
    """The host may ask as soon as a peer has joined; `prepare` has registered the handler by then."""
    async with running(machine()) as host:
        answers: list[Message] = []

        async def ask(session: Session) -> None:
            answers.append(await session.request(CloseContext(1)))

        async with trio.open_nursery() as nursery:
            register = host.on_joined

            def joined(session: Session, greeting: Hello) -> None:
                register(session, greeting)
                nursery.start_soon(ask, session)

            host.server.joined = joined
            async with connect(
                host.transport, host.endpoint, hello(), prepare=lambda session, _: session.on(CloseContext, lambda _: Report(b"ready"))
            ):
                while not answers:
                    await trio.sleep(0.001)
        assert answers == [Report(b"ready")]


async def test_requests_right_behind_the_hello_are_served(machine: Callable[..., Machine]) -> None:
    """In one burst, before the server has done anything else; by a handler that waits, too."""
    async with running(machine()) as host:
        register = host.on_joined

        def joined(session: Session, greeting: Hello) -> None:
            register(session, greeting)

            async def slow(_: CloseContext) -> Report:
                await trio.sleep(0.01)
                return Report(b"slow")

            session.on(CloseContext, slow)

        host.server.joined = joined
        channel = host.transport.connect(host.endpoint, b"raw")
        await channel.send(encode(Kind.HELLO, 0, 0, hello()))
        await channel.send(encode(Kind.REQUEST, 1, 0, CloseContext(1)))
        await channel.send(encode(Kind.REQUEST, 2, 0, Inspect()))
        bodies = [decode_body((await channel.receive())[0]) for _ in range(3)]
        assert bodies == [WELCOME, Report(b"gpu0"), Report(b"slow")]


@pytest.mark.parametrize(
    ("greeting", "why"),
    [
        (hello(version=PROTOCOL_VERSION + 1), r"\(version\).*install the same hmmnet on both sides"),
        (hello(secret=b"wrong"), r"\(secret\).*is this the machine you meant"),
        (hello(secret=b""), r"\(secret\)"),
        (hello(name="nobody"), r"\(name\).*no device of that name"),
    ],
)
async def test_a_peer_is_refused_with_the_reason(machine: Callable[..., Machine], greeting: Hello, why: str) -> None:
    """And leaves no state."""
    async with running(machine()) as host:
        host.decide = lambda asked: WELCOME if asked.name == "gpu0" else Refused("name", "no device of that name")
        with pytest.raises(PeerRefused, match=why):
            async with connect(host.transport, host.endpoint, greeting):
                raise AssertionError("welcomed")
        assert host.idle
        assert host.joined == []
        assert host.server.refused_count == 1


async def test_a_refused_impostor_does_not_disturb_the_device(machine: Callable[..., Machine]) -> None:
    """Without the secret, a hello in a living device's name ends nothing."""
    async with running(machine()) as host, connect(host.transport, host.endpoint, hello()) as (session, _):
        with pytest.raises(PeerRefused, match="secret"):
            async with connect(host.transport, host.endpoint, hello(incarnation=2, secret=b"guess")):
                raise AssertionError("welcomed")
        assert await session.request(Inspect()) == Report(b"gpu0")


async def test_a_restarted_device_replaces_its_old_self(machine: Callable[..., Machine]) -> None:
    """The old session ends, with the reason, before the new one begins; the old process is told. A refused restart ends nothing."""
    lost: list[tuple[str, int]] = []
    async with running(machine()) as host, connect(host.transport, host.endpoint, hello(incarnation=1)) as (old, _):
        host.joined[0].on_lost(lambda cause: lost.append((str(cause), len(host.joined))))
        decide = host.decide
        host.decide = lambda _: Refused("busy", "no room for another life")
        with pytest.raises(PeerRefused, match="no room for another life"):
            async with connect(host.transport, host.endpoint, hello(incarnation=7)):
                raise AssertionError("welcomed")
        assert await old.request(Inspect()) == Report(b"gpu0")
        host.decide = decide
        async with connect(host.transport, host.endpoint, hello(incarnation=2)) as (new, _):
            assert lost == [("gpu0 was replaced by a new incarnation of itself", 1)]
            assert await new.request(Inspect()) == Report(b"gpu0")
            assert [session.incarnation for session in host.server.sessions] == [2]
            with pytest.raises(PeerLost, match="knows no session with us"):
                await old.request(Inspect())
            with pytest.raises(PeerRefused, match=r"was here in this life, and is not any more .*replaced by a new incarnation"):
                async with connect(host.transport, host.endpoint, hello(incarnation=1)):
                    raise AssertionError("welcomed")
            with pytest.raises(PeerRefused, match="connected already"):
                async with connect(host.transport, host.endpoint, hello(incarnation=2)):
                    raise AssertionError("welcomed")


async def test_a_life_that_is_over_does_not_come_back(machine: Callable[..., Machine]) -> None:
    """Its first welcome may still be on its way: who then joined a second time would be two things at once. The next life may."""
    async with running(machine()) as host:
        async with connect(host.transport, host.endpoint, hello(incarnation=1)):
            pass
        with pytest.raises(PeerRefused, match=r"over.*was here in this life, and is not any more \(gpu0 said goodbye\); start"):
            async with connect(host.transport, host.endpoint, hello(incarnation=1)):
                raise AssertionError("welcomed")
        async with connect(host.transport, host.endpoint, hello(incarnation=2)) as (session, _):
            assert await session.request(Inspect()) == Report(b"gpu0")


async def test_a_late_hello_of_an_earlier_life_ends_nothing(machine: Callable[..., Machine]) -> None:
    """Lives 3, 5 and 7 have been here: these, and one in between that nobody has seen, are refused while 7 is here, and after it."""
    async with running(machine()) as host:
        for life in (3, 5):
            async with connect(host.transport, host.endpoint, hello(incarnation=life)):
                pass
        async with connect(host.transport, host.endpoint, hello(incarnation=7)) as (session, _):
            await _refused_as_over(host, 5, 3, 6)
            assert await session.request(Inspect()) == Report(b"gpu0")
        await _refused_as_over(host, 7, 5, 3, 6)
        assert host.server.sessions == []


async def _refused_as_over(host: Machine, *lives: int) -> None:
    for life in lives:
        with pytest.raises(PeerRefused, match=r"\(over\)"):
            async with connect(host.transport, host.endpoint, hello(incarnation=life)):
                raise AssertionError("welcomed")


async def test_clients_may_share_a_name(machine: Callable[..., Machine]) -> None:
    """Two command lines are two peers."""
    async with running(machine()) as host, AsyncExitStack() as stack:
        sessions = [
            (await stack.enter_async_context(connect(host.transport, host.endpoint, hello("cli", role="client"))))[0] for _ in range(2)
        ]
        assert [await session.request(Inspect()) for session in sessions] == [Report(b"cli")] * 2
        assert len(host.server.sessions) == 2


async def test_a_repeated_hello_gets_its_welcome_again(machine: Callable[..., Machine]) -> None:
    """The welcome was lost: the peer asks again, and is one peer all the same."""
    async with running(machine()) as host:
        channel = host.transport.connect(host.endpoint, b"raw")
        for _ in range(3):
            await channel.send(encode(Kind.HELLO, 0, 0, hello()))
            frame, _ = await channel.receive()
            assert decode_header(frame)[0] is Kind.WELCOME
            assert decode_body(frame) == WELCOME
        assert len(host.joined) == 1
        assert host.joined[0].refused == 0


async def test_nobody_there(machine: Callable[..., Machine]) -> None:
    """A host that does not answer is PeerLost after the given time, not a hang."""
    host = machine()
    with pytest.raises(PeerLost, match=r"no host answered within 0\.1 s; is the machine up"):
        async with connect(host.transport, host.endpoint, hello(), connect_s=0.1):
            raise AssertionError("welcomed")


async def test_a_silent_peer_is_lost(machine: Callable[..., Machine]) -> None:
    """Welcomed, then never heard again: gone when the lease is over, and forgotten."""
    async with running(machine(heartbeat_s=0.02, lease_s=0.1, retry_s=0.05)) as host:
        channel = host.transport.connect(host.endpoint, b"raw")
        await channel.send(encode(Kind.HELLO, 0, 0, hello()))
        await channel.receive()
        while not host.lost:
            await trio.sleep(0.01)
        assert "gpu0 was silent for" in str(host.lost[0])
        assert host.idle


async def test_a_frame_of_a_session_that_is_over_is_reset(machine: Callable[..., Machine]) -> None:
    """Its sender need not wait for its lease. Answers are not answered, or two ends could go on forever."""
    async with running(machine()) as host:
        channel = host.transport.connect(host.endpoint, b"raw")
        for kind in (Kind.RESET, Kind.BYE_ACK):
            await channel.send(encode(kind, 0, 0))
        await channel.send(encode(Kind.NOTE, 5, 0, MigrateDone(1)))
        frame, _ = await channel.receive()
        assert decode_header(frame)[0] is Kind.RESET
        assert host.idle


HEADER = struct.Struct("<2sBBIQQ")


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", "garbage"),
        (b"\x00", "garbage"),
        (b"GET / HTTP/1.1", "garbage"),
        (encode(Kind.HELLO, 0, 0, hello())[:-3], "garbage"),
        (encode(Kind.HELLO, 0, 0, hello())[:10], "garbage"),
        (encode(Kind.HELLO, 0, 0, Inspect()), "garbage"),
        (HEADER.pack(MAGIC, PROTOCOL_VERSION, 99, 0, 0, 0), "garbage"),
        (HEADER.pack(MAGIC, PROTOCOL_VERSION + 1, Kind.HELLO, 0, 0, 0) + b"some other form of hello", "version"),
    ],
    ids=range(8),
)
async def test_garbage_is_refused_without_state(machine: Callable[..., Machine], frame: bytes, code: str) -> None:
    """The sender hears why, and the server goes on."""
    async with running(machine()) as host:
        channel = host.transport.connect(host.endpoint, b"raw")
        await channel.send(frame)
        answer, _ = await channel.receive()
        refused = decode_body(answer)
        assert isinstance(refused, Refused)
        assert refused.code == code
        assert host.idle
        async with connect(host.transport, host.endpoint, hello()) as (session, _):
            await session.request(Inspect())


async def test_garbage_in_a_session_does_not_end_it(machine: Callable[..., Machine]) -> None:
    """Broken frames are counted and dropped."""
    async with running(machine()) as host:
        channel = host.transport.connect(host.endpoint, b"raw")
        await channel.send(encode(Kind.HELLO, 0, 0, hello()))
        await channel.receive()
        for frame in (b"", b"junk", bytes(50), encode(Kind.BYE_ACK, 0, 0)):
            await channel.send(frame)
        await channel.send(b"two", b"parts")
        await channel.send(encode(Kind.REQUEST, 1, 0, Inspect()))
        frame, _ = await channel.receive()
        assert decode_body(frame) == Report(b"gpu0")
        assert host.joined[0].refused == 5


async def test_a_flood_of_garbage_is_logged_with_measure(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand bad frames make ten log lines."""
    with MemoryTransport() as transport:
        async with running(Machine(transport, "mem://control")) as host:
            channel = transport.connect(host.endpoint, b"raw")
            for _ in range(1000):
                await channel.send(b"junk")
                await channel.receive()
            assert host.server.refused_count == 1000
    assert len(caplog.records) == 10


@given(st.lists(st.binary(max_size=200) | st.sampled_from([encode(Kind.HELLO, 0, 0, hello()), encode(Kind.BEAT, 0, 0)]), max_size=20))
@example([encode(Kind.HELLO, 0, 0, hello()), encode(Kind.REPLY, 1, 0, Done(), 1), encode(Kind.BYE, 2, 0), encode(Kind.BYE, 2, 0)])
@settings(max_examples=100, deadline=None)
def test_no_bytes_crash_the_server(frames: list[bytes]) -> None:
    """Whatever a peer sends, before or after its hello: the server serves the next one."""

    async def send_all() -> None:
        with MemoryTransport() as transport:
            async with running(Machine(transport, "mem://control")) as host:
                channel = transport.connect(host.endpoint, b"raw")
                for frame in frames:
                    await channel.send(frame)
                async with connect(transport, host.endpoint, hello("gpu1")) as (session, _):
                    assert await session.request(Inspect()) == Report(b"gpu1")

    trio.run(send_all)


@given(frame=st.binary(min_size=1, max_size=60), position=st.integers(0, 200), sequence=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_no_damage_to_a_request_crashes_the_server(frame: bytes, position: int, sequence: int) -> None:
    """A session's frame with bytes overwritten: refused, reset or served; the next peer is served."""

    async def send_damaged() -> None:
        with MemoryTransport() as transport:
            async with running(Machine(transport, "mem://control")) as host:
                channel = transport.connect(host.endpoint, b"raw")
                await channel.send(encode(Kind.HELLO, 0, 0, hello()))
                good = bytearray(encode(Kind.REQUEST, 1 + sequence, 0, Inspect()))
                good[position : position + len(frame)] = frame
                await channel.send(bytes(good))
                async with connect(transport, host.endpoint, hello("gpu1")) as (session, _):
                    assert await session.request(Inspect()) == Report(b"gpu1")

    trio.run(send_damaged)


async def test_oversized_and_multipart_on_the_control_socket(place: str) -> None:
    """A stranger's monsters never reach the server, and its other oddities are refused."""
    with ZmqTransport() as transport:
        async with running(Machine(transport, f"ipc://{place}/control")) as host:
            context = zmq.Context()
            stranger = context.socket(zmq.DEALER)
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(host.endpoint)
            stranger.send_multipart([b"", b"HM", bytes(100)])
            stranger.send(bytes(64 << 20))
            async with connect(transport, host.endpoint, hello()) as (session, _):
                await session.request(Inspect())
            assert host.server.refused_count == 1
            context.destroy(0)


PEER = textwrap.dedent(
    """
    import sys, trio
    from hmmnet.wire.client import connect
    from hmmnet.wire.messages import PROTOCOL_VERSION, Hello, Inspect
    from hmmnet.wire.zmq_transport import ZmqTransport

    async def main():
        hello = Hello(PROTOCOL_VERSION, "device", "gpu0", int(sys.argv[2]), 1, b"s" * 32)
        with ZmqTransport() as transport:
            async with connect(transport, sys.argv[1], hello) as (session, _):
                await session.request(Inspect())
                sys.stdin.read() if sys.argv[3] == "stalled" else await trio.sleep_forever()

    trio.run(main)
    """
)


@asynccontextmanager
async def peer_process(endpoint: str, incarnation: int, mode: str = "alive") -> AsyncIterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", PEER, endpoint, str(incarnation), mode], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("mode", ["alive", "stalled"])
async def test_a_killed_or_stalled_process_is_lost(place: str, mode: str) -> None:
    """kill -9, or a loop that no longer turns: the lease tells; the restarted process gets in at once, without waiting for it."""
    with ZmqTransport() as transport:
        async with running(Machine(transport, f"ipc://{place}/control", heartbeat_s=0.1, lease_s=1.5, retry_s=0.2)) as host:
            async with peer_process(host.endpoint, 1, mode) as process:
                while not host.joined:
                    await trio.sleep(0.01)
                if mode == "alive":
                    await trio.sleep(1.0)
                    assert host.lost == []
                    process.kill()
                while not host.lost:
                    await trio.sleep(0.01)
                assert "was silent" in str(host.lost[0])
                assert host.idle
            async with peer_process(host.endpoint, 2):
                while len(host.joined) < 2:
                    await trio.sleep(0.01)
                async with peer_process(host.endpoint, 3):
                    while len(host.joined) < 3:
                        await trio.sleep(0.01)
                    assert "replaced" in str(host.lost[1])


async def test_a_host_that_comes_back_resets_its_peers(place: str) -> None:
    """A new host at the old place knows no session: its peers learn it at once, not by lease."""
    endpoint = f"ipc://{place}/control"
    connected, restarted, told = trio.Event(), trio.Event(), trio.Event()

    async def live() -> None:
        with ZmqTransport() as peers:
            async with connect(peers, endpoint, hello(), lease_s=math.inf) as (session, _):
                connected.set()
                await restarted.wait()
                with pytest.raises(PeerLost, match="knows no session"):
                    await session.request(Inspect())
                told.set()

    async with trio.open_nursery() as nursery:
        with ZmqTransport() as first:
            async with running(Machine(first, endpoint)):
                nursery.start_soon(live)
                await connected.wait()
        with ZmqTransport() as second:
            async with running(Machine(second, endpoint)):
                restarted.set()
                await told.wait()


async def test_a_closed_transport_ends_its_sessions() -> None:
    """Ours to close, and then whoever still asks hears PeerLost."""
    with MemoryTransport() as transport:
        async with running(Machine(transport, "mem://control")) as host, connect(transport, host.endpoint, hello()) as (session, _):
            with pytest.raises(PeerLost, match="was closed here"):
                session._transmit = transport.bind_channel("mem://x").send_nowait
                transport._pairs["mem://x", b""][0].close()
                await session.request(Inspect())
