"""Who runs first, drawn from a seed.

Tasks that become runnable in the same instant may run in any order; trio shuffles them with a generator of its own, so that nobody relies
on one. Seeded, and with the tasks in a fixed order before the shuffle, that generator makes a run repeatable and still tries other orders
with other seeds. trio has no public name for either; testing libraries reach for the same two (`_r`, `_ALLOW_DETERMINISTIC_SCHEDULING`).
Nor has it one for who waits in `wait_all_tasks_blocked`, which a clock that jumps has to know (`tasks_wait_for_idle`), nor for the scopes
that tasks are in (`drop_shields`), nor for what makes a wait fail from outside (`interrupt`), nor for whom the scheduler asks at each step
of a task (`Hooks`), nor for the files in which it waits for the world outside, which a run that is forked must not share (`part`), and at
which it need not look in every round (`rounds`), nor for how scopes and nurseries begin and end (`scopes`).
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from random import Random
from typing import Any, NoReturn

import trio
from trio._core import _run as trio_run
from trio.abc import Instrument

from hmmnet.errors import HmmnetError
from hmmnet.sleeping import unshield

from .rounds import FILES, files
from .scopes import shorter

CHANCE = "_r"
ORDERED = "_ALLOW_DETERMINISTIC_SCHEDULING"
IDLE = "waiting_for_idle"
HOOKS = "Instruments"
"""Whom the scheduler tells of what it does."""
THEIRS = getattr(trio_run, HOOKS, None)
KNOWN_BITS = 64
BITS = tuple(map(int.bit_length, range(KNOWN_BITS)))
"""How many bits the numbers take that are asked for: of tasks in a round."""
_TRIOS: list[tuple[Any, str, Any]] = []
"""What trio has by itself where ours stands while such a block runs."""
_UNDER_WAY: list[list[tuple[Any, str, Any]]] = []
"""What each block that has not ended put there, the newest last: blocks may lie within each other, or overlap in threads."""
_CHANGING = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every trio run that begins inside the block is scheduled from `seed`, that of the block begun last where several are under way.

    Raises HmmnetError for a trio whose inside is another.
    """
    chance = getattr(trio_run, CHANCE, None)
    known = all(hasattr(trio_run, name) for name in (ORDERED, HOOKS, FILES)) and hasattr(trio_run.Runner, IDLE)
    if not isinstance(chance, Random) or not known:
        raise HmmnetError(f"trio {version('trio')} cannot be scheduled from a seed: hmmnet does not know its inside; use another trio")
    places = [
        (trio_run, CHANCE, Shuffler(seed)),
        (trio_run, ORDERED, True),
        (trio_run, HOOKS, Hooks),
        (trio_run, FILES, files()),
        *shorter(),
    ]
    with _CHANGING:
        if not _UNDER_WAY:
            _TRIOS[:] = [(place, name, getattr(place, name)) for place, name, _ in places]
        _UNDER_WAY.append(places)
        _put(places)
    try:
        yield
    finally:
        with _CHANGING:
            _UNDER_WAY[:] = [others for others in _UNDER_WAY if others is not places]
            _put(_UNDER_WAY[-1] if _UNDER_WAY else _TRIOS)


def _put(places: Sequence[tuple[Any, str, Any]]) -> None:
    for place, name, what in places:
        setattr(place, name, what)


class Shuffler(Random):
    """The generator of a run. Most rounds of the scheduler have one task or two, and Python's own `shuffle` is made for more."""

    def shuffle(self, x: MutableSequence[Any]) -> None:
        """`Random.shuffle`: what it would make of `x`, from the same draws."""
        draw = self.getrandbits
        for last in range(len(x) - 1, 0, -1):
            count = last + 1
            bits = BITS[count] if count < KNOWN_BITS else count.bit_length()
            other = draw(bits)
            while other >= count:
                other = draw(bits)
            x[last], x[other] = x[other], x[last]


class Hooks(dict[str, dict[Instrument, None]]):
    """trio's `Instruments`, but a dict itself: mostly nobody is in it, and the scheduler looks for that at each step of a task."""

    def __init__(self, incoming: Sequence[Instrument]) -> None:
        super().__init__({"_all": {}})
        for instrument in incoming:
            self.add_instrument(instrument)

    @property
    def data(self) -> dict[str, dict[Instrument, None]]:
        """See `collections.UserDict`."""
        return self

    add_instrument: Any = getattr(THEIRS, "add_instrument", None)
    remove_instrument: Any = getattr(THEIRS, "remove_instrument", None)
    call: Any = getattr(THEIRS, "call", None)


def tasks_wait_for_idle() -> bool:
    """Whether somebody in this trio run waits until all tasks are blocked; then time stands still."""
    return bool(trio_run.GLOBAL_RUN_CONTEXT.runner.waiting_for_idle)


def threads_at_work() -> bool:
    """Whether tasks of this trio run wait for functions in threads (trio.to_thread)."""
    return trio.to_thread.current_default_thread_limiter().borrowed_tokens > 0


def drop_shields() -> None:
    """Nothing shields anybody in this trio run any more, no cancel scope and no bell: what was cancelled ends."""
    for task in list(trio_run.GLOBAL_RUN_CONTEXT.runner.tasks):
        status: Any = task._cancel_status  # noqa: SLF001 - see above
        while status is not None:
            status._scope.shield = False  # noqa: SLF001
            status = status.parent
    unshield()


def interrupt(task: Any, failed: Callable[[], NoReturn]) -> None:
    """What `task` of this trio run waits for, if it can be left, raises what `failed` does, cancelled or not."""
    if task._abort_func is not None:  # noqa: SLF001 - see above
        task._attempt_abort(failed)  # noqa: SLF001 - see above


EPOLL, REGISTERED, FORCED, ENTRIES = "_epoll", "_registered", "_force_wakeup", "entry_queue"
"""Of what the scheduler waits with: its epoll set, what is registered there, and who wakes it."""


def can_part() -> bool:
    """Whether `part` knows what the scheduler of this trio run waits with."""
    runner = trio_run.GLOBAL_RUN_CONTEXT.runner
    waits: Any = runner.io_manager
    pairs = (getattr(waits, FORCED, None), getattr(getattr(runner, ENTRIES, None), "wakeup", None))
    known = all(isinstance(getattr(pair, "write_sock", None), socket.socket) for pair in pairs)
    return known and isinstance(getattr(waits, EPOLL, None), select.epoll) and isinstance(getattr(waits, REGISTERED, None), dict)


def part() -> None:
    """In a process that was forked inside a trio run: from now on the run here and the one that it came of share no files.

    An epoll set is the same in both, whoever changes it, and so are the sockets that wake it: each is replaced by one of its own, under the
    same number.
    """
    runner = trio_run.GLOBAL_RUN_CONTEXT.runner
    waits: Any = runner.io_manager
    forced = getattr(waits, FORCED)
    for pair in (forced, runner.entry_queue.wakeup):
        for old, new in zip((pair.wakeup_sock, pair.write_sock), socket.socketpair(), strict=True):
            new.setblocking(False)
            os.dup2(new.fileno(), old.fileno(), inheritable=False)
            new.close()
    epoll, fresh = getattr(waits, EPOLL), select.epoll()
    os.dup2(fresh.fileno(), epoll.fileno(), inheritable=False)
    fresh.close()
    epoll.register(forced.wakeup_sock, select.EPOLLIN)
    for file, waiters in getattr(waits, REGISTERED).items():
        epoll.register(file, waiters.current_flags | select.EPOLLONESHOT)
