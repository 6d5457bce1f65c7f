"""What all tests share."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from inspect import iscoroutinefunction
from typing import Any

import pytest
import trio
from trio.testing import MockClock


def in_virtual_time(main: Callable[..., Any], *, clock: trio.abc.Clock | None, **settings: Any) -> Any:
    """`trio.run` with a clock that jumps on when nobody can run: a machine that stalls ends no lease."""
    return trio.run(main, clock=clock or MockClock(autojump_threshold=0), **settings)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests marked `virtual_time` run so."""
    if item.get_closest_marker("virtual_time") is not None and iscoroutinefunction(getattr(item, "obj", None)):
        item.add_marker(pytest.mark.trio(run=in_virtual_time))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell ignores SIGINT for what it starts in the background, and so would every process that a test starts and interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _machines_of_our_own() -> Iterator[None]:
    """Machines that somebody runs on this computer are no business of the tests."""
    with tempfile.TemporaryDirectory(prefix="hm") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HMMNET_DIR", folder)
        yield
