"""A relay of TCP connections, between peers of which one is told its port: it can break them, refuse new ones, and serve again."""

from __future__ import annotations

import contextlib
import socket

import trio

BYTES_AT_ONCE = 1 << 16


class Relay:
    """Listens at a free port of loopback for who wants to speak to port `to`. Its tasks run in `nursery`."""

    def __init__(self, nursery: trio.Nursery, to: int) -> None:
        self.port = 0
        self.left: int | None = None
        """Bytes that it carries from who connected until it cuts itself; None: as many as come."""
        self._nursery = nursery
        self._to = to
        self.open()

    @property
    def endpoint(self) -> str:
        """Where to connect."""
        return f"tcp://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Serve, at the same port as before, whatever comes."""
        self.left = None
        sock = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        sock.setblocking(False)
        self.port = sock.getsockname()[1]
        self._scope = trio.CancelScope()
        self._nursery.start_soon(self._serve, trio.SocketListener(trio.socket.from_stdlib_socket(sock)), self._scope)

    def cut(self) -> None:
        """Break all connections, and refuse further ones."""
        self._scope.cancel()

    async def _serve(self, listener: trio.SocketListener, scope: trio.CancelScope) -> None:
        with scope:
            async with listener, trio.open_nursery() as nursery:
                while True:
                    nursery.start_soon(self._relay, await listener.accept())

    async def _relay(self, near: trio.SocketStream) -> None:
        async with near:
            try:
                far = await trio.open_tcp_stream("127.0.0.1", self._to)
            except OSError:
                return  # nobody is there (any more), and who asked finds a connection that ends
            async with far, trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, near, far, nursery.cancel_scope, True)
                nursery.start_soon(self._pump, far, near, nursery.cancel_scope, False)

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream, both: trio.CancelScope, counts: bool) -> None:
        """Carry bytes until one of the two ends; then the other is ended, too."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some(BYTES_AT_ONCE):
                if counts and self.left is not None:
                    data = data[: self.left]
                    self.left -= len(data)
                await target.send_all(data)
                if self.left == 0:
                    self.cut()
        both.cancel()
