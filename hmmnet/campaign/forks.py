"""One run for many: a simulated run that forks at each moment at which something could happen, and it happens in the child.

A simulated machine is one process without threads, and what it does next follows from what it has done. So a run in which a fault comes at
the tenth time is, up to there, the run in which it comes at the eleventh, and the one in which it never comes. Instead of doing that again
for each, the run in which it never comes is forked at each time: the child goes on with the fault, from exactly where it would have been
alone, and says what came of it; the parent waits, and goes on without.

What a child inherits is its own from then on: memory is copied as it is written, and the files that the scheduler waits with are replaced
(`hmmnet.sim.schedule.part`). Memory that host and device share as one file is not copied: a machine with coherent memory is not forked.
"""

from __future__ import annotations

import gc
import os
import pickle
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Generic, TypeVar

from hmmnet.errors import HmmnetError
from hmmnet.faults.controls import decided_by
from hmmnet.sim.schedule import can_part, part

from .machines import topology_of

T = TypeVar("T")
PIECE = 1 << 16


@dataclass(frozen=True)
class Failed:
    """What a child sends that has no result."""

    why: str


@lru_cache(maxsize=64)
def can_fork(machine: str) -> bool:
    """Whether a run of that machine (TOML) may be forked."""
    return all(spec.kind != "coherent" for spec in topology_of(machine).devices)


class Forks(Generic[T]):
    """Decides about occurrences (`hmmnet.faults.controls`): each of `wanted` happens, in a child of its own."""

    def __init__(self, wanted: Collection[int]) -> None:
        self.results: list[tuple[int, T]] = []
        """Which occurrence, and what `run` has come to in the child in which it happened; in their order."""
        self._wanted = wanted
        self._failure: HmmnetError | None = None
        """Why a child did not come to anything: none is forked any more."""
        self._tell = -1
        """In a child: where its result goes."""

    def run(self, work: Callable[[], T]) -> T:
        """Do `work`, in which occurrences are decided about: what it returns when none of them happens. Raises what it raises then.

        Raises HmmnetError when a child raises something or dies: not where the occurrence was, where it would be part of what is tried,
        but when the run in which none happens is over.
        """
        try:
            with decided_by(self._decide):
                result = work()
        except BaseException as error:
            if self._tell >= 0:
                self._end(self._failure or error)
            raise
        if self._tell >= 0:
            self._end(self._failure or result)
        if self._failure is not None:
            raise self._failure
        return result

    def _decide(self, occurrence: int) -> bool:
        if self._tell >= 0 or self._failure is not None or occurrence not in self._wanted:
            return False
        try:
            return self._fork(occurrence)
        except Exception as error:  # noqa: BLE001 - raised by `run`: here it would end a task of the run
            self._failure = error if isinstance(error, HmmnetError) else HmmnetError(f"occurrence {occurrence} was not tried: {error!r}")
            return False

    def _fork(self, occurrence: int) -> bool:
        """True in the child, in which it happens; False in the parent, once the child has come to its end."""
        if not can_part():
            raise HmmnetError(f"trio {version('trio')} cannot be forked: hmmnet does not know its inside; use another trio")
        hear, tell = os.pipe()
        child = os.fork()
        if not child:
            os.close(hear)
            self._tell = tell
            part()
            gc.disable()  # it is not here for long, and looking for garbage would copy everything
            return True
        os.close(tell)
        self.results.append((occurrence, self._heard(occurrence, hear, child)))
        return False

    def _heard(self, occurrence: int, hear: int, child: int) -> T:
        """What a child has come to. Raises HmmnetError when that is nothing."""
        pieces = []
        with os.fdopen(hear, "rb") as file:
            while piece := file.read(PIECE):
                pieces.append(piece)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            raise HmmnetError(f"the run in which occurrence {occurrence} happens ended with status {status}")
        result: T | Failed = pickle.loads(b"".join(pieces))  # noqa: S301 - a child of ours wrote it
        if isinstance(result, Failed):
            raise HmmnetError(f"the run in which occurrence {occurrence} happens failed: {result.why}")
        return result

    def _end(self, result: T | BaseException) -> None:
        """The end of a child, which has nothing to clean up: all of it is its parent's, too."""
        status = 1
        try:
            raw = memoryview(_pickled(result))
            while raw:
                raw = raw[os.write(self._tell, raw) :]
            status = 0
        finally:
            os._exit(status)


def _pickled(result: object) -> bytes:
    """What a child sends: `result`, or the text of what it raised, also in case `result` cannot be sent."""
    if isinstance(result, BaseException):
        return pickle.dumps(Failed("".join(traceback.format_exception(result)).strip()))
    try:
        return pickle.dumps(result)
    except Exception as error:  # noqa: BLE001 - any class may refuse, each in its way
        return pickle.dumps(Failed(f"{result!r:.200} cannot be sent: {error!r}"))
