"""The connecting end: say hello until welcomed, then feed one channel's frames to one session."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from hmmnet.errors import PeerLost, PeerRefused, ProtocolError

from .codec import Kind, decode_body, decode_header, encode
from .exchange import HEARTBEAT_S, RETRY_S
from .messages import Hello, Refused, Welcome
from .reading import Reader
from .session import Session
from .transport import Channel, HandsOn, Transport

CONNECT_S = 10.0
"""How long a hello is repeated before the host counts as not there."""


@asynccontextmanager
async def connect(
    transport: Transport,
    endpoint: str,
    hello: Hello,
    *,
    prepare: Callable[[Session, Welcome], None] | None = None,
    connect_s: float = CONNECT_S,
    heartbeat_s: float = HEARTBEAT_S,
    lease_s: float | None = None,
    retry_s: float = RETRY_S,
    patience_s: float = 0.0,
) -> AsyncIterator[tuple[Session, Welcome]]:
    """A session with the host at `endpoint`; ends with BYE when the block is left. Times are seconds of trio's clock.

    `prepare` registers handlers before the first frame after the welcome is read, so that no early request is missed; so may the block
    itself, before its first await. `lease_s` is what the host's welcome says unless given; for `patience_s` see `Session`.
    Raises PeerRefused with the host's reason, and PeerLost when nobody answers within `connect_s`.
    """
    channel = transport.connect(endpoint, transport.fresh_identity(hello.name))
    failure: Exception | None = None
    try:
        welcome = await _say_hello(channel, hello, endpoint, connect_s, retry_s)
        session = Session(
            channel.send_nowait,
            peer_name="host",
            role="host",
            incarnation=welcome.host_incarnation,
            heartbeat_s=heartbeat_s,
            lease_s=welcome.lease_s if lease_s is None else lease_s,
            retry_s=retry_s,
            patience_s=patience_s,
        )
        reader = Reader(partial(_step, channel, session), channel.nudge)
        session.reader = reader if reader.shared else None
        if prepare is not None:
            prepare(session, welcome)
        # Who is cancelled hears the answer to its goodbye; over memory, where a second without it costs nothing, it does not.
        listening = trio.CancelScope(shield=True)
        async with trio.open_nursery() as nursery:
            session.start(nursery)
            if isinstance(channel, HandsOn):
                nursery.start_soon(channel.hand_on, session.deliver)
            else:
                nursery.start_soon(_until, listening, reader.run)
            try:
                yield session, welcome
            except Exception as error:  # noqa: BLE001 - raised again below: as it is, not in the nursery's group
                failure = error
            finally:
                with trio.CancelScope(shield=True):
                    await session.bye()
                nursery.cancel_scope.cancel()
                listening.cancel()
        if failure is not None:
            raise failure
    finally:
        with trio.CancelScope(shield=True):
            await channel.aclose()


async def _until(scope: trio.CancelScope, function: Callable[[], Awaitable[None]]) -> None:
    """Run `function` until `scope`, which is nobody else's, is cancelled."""
    with scope:
        await function()


async def _say_hello(channel: Channel, hello: Hello, endpoint: str, connect_s: float, retry_s: float) -> Welcome:
    """The welcome. Session frames that overtake a repeated one are left to their sender, which repeats them."""
    frame = encode(Kind.HELLO, 0, 0, hello)
    ends_s = trio.current_time() + connect_s
    while (again_s := min(trio.current_time() + retry_s, ends_s)) > trio.current_time():
        with trio.move_on_at(again_s):
            await channel.send(frame)
            while True:
                received, _ = await channel.receive()
                if decode_header(received)[0] is Kind.WELCOME:
                    return _welcome(decode_body(received))
    raise PeerLost(f"{endpoint}: no host answered within {connect_s:g} s; is the machine up?")


def _welcome(body: object) -> Welcome:
    if isinstance(body, Refused):
        raise PeerRefused(f"the host refused us ({body.code}): {body.why}")
    if not isinstance(body, Welcome):
        raise ProtocolError(f"the host answered hello with {type(body).__name__}")
    return body


async def _step(channel: Channel, session: Session) -> Awaitable[None] | None:
    """Take one frame and deliver it."""
    frame, payload = await channel.receive()
    return session.deliver(frame if payload is None else b"")
