"""Handlers and kernels that crash: what they raise is answered as a failure, and told to whoever looks for our bugs.

A peer cannot tell a bug of ours from what was done to somebody, for both reach it as text. A checker that shares the process can: it
listens here, to all sessions and jobs of the tasks that it starts meanwhile. What crashes in another process is in that one's log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from hmmnet.errors import is_crash

Listener: TypeAlias = Callable[[str, Exception], None]
"""Takes which message of whom (or whose kernel), and what was raised. It must not raise."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of handlers that crash, here and in all tasks that are started from here meanwhile."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(whose: str, error: Exception) -> None:
    """A handler, or a kernel, raised `error`: if that is none of the errors that this machine knows, it has crashed."""
    listener = _listener.get()
    if listener is not None and is_crash(error):
        listener(whose, error)
