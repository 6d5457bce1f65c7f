"""Who runs first, drawn from a seed.

Tasks that become runnable in the same instant may run in any order; trio shuffles them with a generator of its own, so that nobody relies
on one. Seeded, and with the tasks in a fixed order before the shuffle, that generator makes a run repeatable and still tries other orders
with other seeds. trio has no public name for either; testing libraries reach for the same two (`_r`, `_ALLOW_DETERMINISTIC_SCHEDULING`).
Nor has it one for who waits in `wait_all_tasks_blocked`, which a clock that jumps has to know (`tasks_wait_for_idle`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from random import Random

from trio._core import _run as trio_run

from hmmnet.errors import HmmnetError

ORDERED = "_ALLOW_DETERMINISTIC_SCHEDULING"
IDLE = "waiting_for_idle"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every trio run that begins inside the block is scheduled from `seed`. Raises HmmnetError for a trio whose inside is another."""
    chance = getattr(trio_run, "_r", None)
    if not isinstance(chance, Random) or not hasattr(trio_run, ORDERED) or not hasattr(trio_run.Runner, IDLE):
        raise HmmnetError(f"trio {version('trio')} cannot be scheduled from a seed: hmmnet does not know its inside; use another trio")
    before, ordered = chance.getstate(), getattr(trio_run, ORDERED)
    chance.seed(seed)
    setattr(trio_run, ORDERED, True)
    try:
        yield
    finally:
        chance.setstate(before)
        setattr(trio_run, ORDERED, ordered)


def tasks_wait_for_idle() -> bool:
    """Whether somebody in this trio run waits until all tasks are blocked; then time stands still."""
    return bool(trio_run.GLOBAL_RUN_CONTEXT.runner.waiting_for_idle)
