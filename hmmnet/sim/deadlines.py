"""Cancel scopes, in virtual time, that enter their deadlines in trio's list without a generator each time.

A scope does so when it is entered, left and cancelled, nearly always to find that there is nothing to enter. trio's context manager around
those three (``_core/_run.py``, `CancelScope._might_change_registered_deadline`) costs as much as all the rest of them. Ours does the same;
as with `rounds`, only beside a trio that is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import trio
from trio._core import _run as trio_run

from . import rounds

REGISTERING = "_might_change_registered_deadline"
"""What trio calls it."""


class Registering:
    """Around what changes the deadline of `scope`, or whether it counts."""

    __slots__ = ("_scope",)

    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        scope = self._scope
        old_s = scope._registered_deadline
        over = scope._cancel_status is None or scope._cancel_called
        new_s = math.inf if over else scope._deadline
        if old_s != new_s:
            scope._registered_deadline = new_s
            runner = trio_run.GLOBAL_RUN_CONTEXT.runner
            if old_s != math.inf:
                runner.deadlines.remove(old_s, scope)
            if new_s != math.inf:
                runner.deadlines.add(new_s, scope)
            if runner.is_guest:
                runner.force_guest_tick_asap()


def registering() -> Callable[[Any], AbstractContextManager[None]] | None:
    """What is to stand where trio's method does: trio's, where it is not known; None where there is none."""
    theirs: Callable[[Any], AbstractContextManager[None]] | None = getattr(trio.CancelScope, REGISTERING, None)
    if trio.__version__ not in rounds.KNOWN or theirs is None:
        return theirs

    def ours(scope: Any) -> Registering:
        return Registering(scope)

    return ours
