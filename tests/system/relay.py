"""A relay of TCP connections, between peers of which one is told its port.

It can break them, refuse new ones, and serve again; let what comes fall into the void, or leave it where it is, while both ends see their
connections open; and be slow.
"""

from __future__ import annotations

import contextlib
import math
import socket
import sys
from collections.abc import Callable

import trio

BYTES_AT_ONCE = 1 << 16


class Relay:
    """Listens at a free port of loopback for who wants to speak to port `to`. Its tasks run in `nursery`."""

    def __init__(self, nursery: trio.Nursery, to: int) -> None:
        self.port = 0
        self.left: int | None = None
        """Bytes that it carries from who connected until it does what `then` says; None: as many as come."""
        self.then: Callable[[], None] = self.cut
        self.bytes_per_s = math.inf
        """That it carries in each direction of a connection."""
        self.connections = 0
        """Made so far."""
        self._dead = 0
        """So many of them, the oldest, are half dead."""
        self._flows = trio.Event()
        self._flows.set()
        self._nursery = nursery
        self._to = to
        self.open()

    @property
    def endpoint(self) -> str:
        """Where to connect."""
        return f"tcp://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Serve, at the same port as before, whatever comes."""
        self.left, self._dead = None, 0
        self._flows.set()
        sock = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        sock.setblocking(False)
        self.port = sock.getsockname()[1]
        self._scope = trio.CancelScope()
        self._nursery.start_soon(self._serve, trio.SocketListener(trio.socket.from_stdlib_socket(sock)), self._scope)

    def swallow(self, *, new: bool) -> None:
        """Carry nothing more over connections that are there, nor over `new` ones, if those are meant, too. They stay as they are."""
        self._dead = sys.maxsize if new else self.connections

    def pause(self) -> None:
        """Take nothing more, and carry nothing, as a process that is stopped."""
        self._flows = trio.Event()

    def go_on(self) -> None:
        """After a pause."""
        self._flows.set()

    def cut(self) -> None:
        """Break all connections, and refuse further ones."""
        self._scope.cancel()

    async def _serve(self, listener: trio.SocketListener, scope: trio.CancelScope) -> None:
        with scope:
            async with listener, trio.open_nursery() as nursery:
                while True:
                    nursery.start_soon(self._relay, await listener.accept())

    async def _relay(self, near: trio.SocketStream) -> None:
        number, self.connections = self.connections, self.connections + 1
        async with near:
            try:
                far = await trio.open_tcp_stream("127.0.0.1", self._to)
            except OSError:
                return  # nobody is there (any more), and who asked finds a connection that ends
            async with far, trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, number, near, far, nursery.cancel_scope, True)
                nursery.start_soon(self._pump, number, far, near, nursery.cancel_scope, False)

    async def _pump(self, number: int, source: trio.SocketStream, target: trio.SocketStream, both: trio.CancelScope, counts: bool) -> None:
        """Carry bytes until one of the two ends; then the other is ended, too, unless the connection is half dead."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some(BYTES_AT_ONCE):
                await self._flows.wait()
                if number < self._dead:
                    continue
                await trio.sleep(len(data) / self.bytes_per_s)
                if counts and self.left is not None:
                    data = data[: self.left]
                    self.left -= len(data)
                await target.send_all(data)
                if self.left == 0:
                    self.then()
                    self.left = None
        if number < self._dead or not self._flows.is_set():
            await trio.sleep_forever()
        both.cancel()
