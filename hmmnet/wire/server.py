"""The listening end: peers say hello, are checked, and become sessions.

A peer that has not been welcomed leaves no state behind, whatever it sends. A wrong version, a wrong secret and garbage are answered with
`Refused` and forgotten; a frame of a session that is over is answered with RESET, so that its sender need not wait for its lease.

A device has one session: a hello with its name and another incarnation is that device restarted, and the old session ends with PeerLost
before the new one begins. The hello of a session that lives is a repeat, and gets its welcome again. The hello of a session that is over
is refused: a welcome that was late may have reached its sender, who would take itself for what it was welcomed as then. So is one of an
earlier life: numbers of lives rise. Peers of other roles may share a name.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from hmmnet.errors import PeerLost, ProtocolError
from hmmnet.sleeping import sleep

from .codec import Kind, VersionError, decode_body, decode_header, encode
from .exchange import HEARTBEAT_S, LEASE_S, RETRY_S
from .messages import PROTOCOL_VERSION, TEXT_MAX, Hello, Refused, Welcome
from .reading import Reader
from .secrets import same_secret
from .session import Session
from .transport import HandsOn, Listener

PEERS_MAX = 1024
"""Sessions of one server: more than a machine has devices; a flood of welcomed clients ends here."""
SINGLE_ROLES = frozenset({"device"})
"""Roles in which a name is one peer: a new incarnation replaces the old."""

log = logging.getLogger("hmmnet.wire")


@dataclass
class Peer:
    """A welcomed peer: its address in the listener, its session, and its welcome for repeats."""

    address: bytes
    session: Session
    welcome: bytes


@dataclass
class Server:
    """Accepts peers on `listener`.

    `welcome` decides about a hello whose version and secret are right: a `Welcome` or a `Refused`. For a welcome the session is made and
    given to `joined`, which registers handlers, before the peer hears of it; neither may wait. The three times are seconds of trio's clock.
    """

    listener: Listener
    secret: bytes
    welcome: Callable[[Hello], Welcome | Refused]
    joined: Callable[[Session, Hello], None]
    heartbeat_s: float = HEARTBEAT_S
    lease_s: float = LEASE_S
    retry_s: float = RETRY_S
    refused_count: int = field(default=0, init=False)
    _by_address: dict[bytes, Peer] = field(default_factory=dict, init=False)
    _by_name: dict[tuple[str, str], Peer] = field(default_factory=dict, init=False)
    _over: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict, init=False)
    """The last incarnation of each name in `SINGLE_ROLES` whose session is over, and why it is."""
    _reader: Reader | None = field(default=None, init=False)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._reader = Reader(partial(self._step, nursery), self.listener.nudge)
            nursery.start_soon(self._tick)
            task_status.started()
            if isinstance(self.listener, HandsOn):
                await self.listener.hand_on(partial(self._arrived, nursery))
            await self._reader.run()

    async def _tick(self) -> None:
        """One timer for all sessions."""
        while True:
            await sleep(self.heartbeat_s)
            for session in self.sessions:
                session.tick()

    async def _step(self, nursery: trio.Nursery) -> Awaitable[None] | None:
        """Take one frame and deliver it."""
        return self._arrived(nursery, *await self.listener.receive())

    def _arrived(self, nursery: trio.Nursery, address: bytes, frame: bytes) -> Awaitable[None] | None:
        """A frame is here, from anybody."""
        peer = self._by_address.get(address)
        if peer is None:
            self._stranger(address, frame, nursery)
            return None
        return peer.session.deliver(frame)

    @property
    def sessions(self) -> list[Session]:
        """The sessions that live, in the order of joining."""
        return [peer.session for peer in self._by_address.values() if peer.session.lost is None]

    async def bye(self) -> None:
        """Say goodbye to all peers at once; call it while `run` runs."""
        async with trio.open_nursery() as nursery:
            for session in self.sessions:
                nursery.start_soon(session.bye)

    def hang_up(self) -> None:
        """After `run`, however that ended: who still waits for a peer hears that nobody will answer."""
        for session in self.sessions:
            session.hang_up()

    def _stranger(self, address: bytes, frame: bytes, nursery: trio.Nursery) -> None:
        """A frame from an address without a session."""
        try:
            kind, _, _, _ = decode_header(frame)
            hello = decode_body(frame) if kind is Kind.HELLO else None
        except VersionError as error:
            self._refuse(address, Refused("version", str(error)))
            return
        except ProtocolError as error:
            self._refuse(address, Refused("garbage", str(error)[:TEXT_MAX]))
            return
        if isinstance(hello, Hello):
            self._hello(address, hello, nursery)
        elif hello is not None:
            self._refuse(address, Refused("garbage", f"a session opens with Hello, not {type(hello).__name__}"))
        elif kind not in (Kind.RESET, Kind.WELCOME, Kind.BYE_ACK):  # those are answers: to answer them could go on forever
            self._put(address, encode(Kind.RESET, 0, 0))

    def _hello(self, address: bytes, hello: Hello, nursery: trio.Nursery) -> None:
        known = self._by_name.get((hello.role, hello.name))
        refused = self._check(hello, known)
        if refused is not None:
            self._refuse(address, refused)
            return
        answer = self.welcome(hello)
        if isinstance(answer, Refused):
            self._refuse(address, answer)
            return
        if known is not None:
            known.session.end(PeerLost(f"{hello.name} was replaced by a new incarnation of itself"))
        session = Session(
            partial(self.listener.send_nowait, address),
            peer_name=hello.name,
            role=hello.role,
            incarnation=hello.incarnation,
            heartbeat_s=self.heartbeat_s,
            lease_s=self.lease_s,
            retry_s=self.retry_s,
        )
        session.reader = self._reader if self._reader is not None and self._reader.shared else None
        peer = Peer(address, session, encode(Kind.WELCOME, 0, 0, answer))
        self._remember(peer, hello)
        self.joined(session, hello)
        session.start(nursery, ticked=True)
        self._put(address, peer.welcome)

    def _check(self, hello: Hello, known: Peer | None) -> Refused | None:
        """Why not; None for a hello that is in order."""
        if hello.version != PROTOCOL_VERSION:
            why = f"you speak protocol version {hello.version}, this host {PROTOCOL_VERSION}: install the same hmmnet on both sides"
            return Refused("version", why)
        if not same_secret(hello.secret, self.secret):
            return Refused("secret", "wrong machine secret: is this the machine you meant?")
        over, why = self._over.get((hello.role, hello.name), (-1, ""))
        if hello.incarnation == over:
            return Refused("over", f"{hello.name} was here in this life, and is not any more ({why}); start it anew"[:TEXT_MAX])
        latest = over if known is None else known.session.incarnation
        if hello.role in SINGLE_ROLES and hello.incarnation < latest:
            later = f"a later life of {hello.name} has been here; if this is the latest, the clock of its computer is behind"
            return Refused("over", f"{later} ({hello.incarnation} is less than {latest})"[:TEXT_MAX])
        if known is None:
            return Refused("busy", f"{PEERS_MAX} peers are connected already") if len(self._by_address) >= PEERS_MAX else None
        if hello.incarnation == known.session.incarnation:
            return Refused("name", f"{hello.name} is connected already, with this incarnation; a restarted device takes a new one")
        return None

    def _remember(self, peer: Peer, hello: Hello) -> None:
        """Enter a peer in the books, and take it out again when its session is over."""
        key = (hello.role, hello.name)
        single = hello.role in SINGLE_ROLES

        def forget(cause: PeerLost) -> None:
            self._by_address.pop(peer.address, None)
            if single and self._by_name.get(key) is peer:
                del self._by_name[key]
                self._over[key] = hello.incarnation, str(cause)

        peer.session.on_lost(forget)
        peer.session.on_hello = lambda: self._put(peer.address, peer.welcome)
        self._by_address[peer.address] = peer
        if single:
            self._by_name[key] = peer

    def _refuse(self, address: bytes, refused: Refused) -> None:
        self.refused_count += 1
        if self.refused_count & (self.refused_count - 1) == 0:  # log the 1st, 2nd, 4th, 8th ...: a flood must not fill the disk
            log.warning("refused a peer (%d so far): %s: %s", self.refused_count, refused.code, refused.why)
        self._put(address, encode(Kind.WELCOME, 0, 0, refused))

    def _put(self, address: bytes, frame: bytes) -> None:
        try:
            self.listener.send_nowait(address, frame)
        except trio.WouldBlock:
            return  # the peer is gone or does not read; it asks again if it wants to know
