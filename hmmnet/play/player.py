"""Plays one script on one process and keeps what each line answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from hmmnet.errors import HmmnetError, KernelError, SignalError
from hmmnet.program import Process

from .compare import UNSUPPORTED, Outcome, compare
from .grammar import Step, Unsupported, parse_steps
from .operations import OPERATIONS, signal_word, usages
from .script import Script
from .stage import Stage

SCRIPT_SECONDS_MAX = 30.0
"""The recorder's own alarm: a script that takes longer hangs."""


class MachineBroken(HmmnetError):
    """The machine cannot be trusted with another script; `outcome` says how far this one came."""

    def __init__(self, outcome: Outcome, why: str) -> None:
        self.outcome = outcome
        super().__init__(why)


def prepare(script: Script) -> list[Step]:
    """The script's operations, parsed. Raises ScriptError."""
    return parse_steps(script, usages())


async def play(script: Script, steps: Sequence[Step], process: Process, device_of: Callable[[int], str]) -> Outcome:
    """Play `steps` of `script` on a fresh `process` and compare. The process is ended at the end, as the recorder's was.

    Raises MachineBroken when an operation failed in a way that no kernel has, or hung.
    """
    stage = Stage(process, device_of)
    got: dict[int, str] = {}
    unsupported = tuple(s.arguments.what for s in steps if isinstance(s.arguments, Unsupported))
    broken = why = ""
    with trio.move_on_after(SCRIPT_SECONDS_MAX) as scope:
        try:
            for step in steps:
                if isinstance(step.arguments, Unsupported):
                    why = f"{UNSUPPORTED}: {step.arguments.what}"
                    break
                got[step.operation.number] = await answer(stage, step)
            await stage.end()
        except HmmnetError as error:
            broken = f"{type(error).__name__}: {error}"
    if scope.cancelled_caught:
        broken = f"no answer within {SCRIPT_SECONDS_MAX:g} s"
    outcome = compare(script, got, unsupported, broken or why)
    if broken:
        raise MachineBroken(outcome, broken)
    return outcome


async def answer(stage: Stage, step: Step) -> str:
    """The text after ``=>`` for one operation. Errors that are no kernel's pass through."""
    assert not isinstance(step.arguments, Unsupported)
    entry = OPERATIONS[step.operation.words[0]]
    try:
        return await entry.play(stage, *step.arguments)
    except KernelError as error:
        return f"ERR {error.name}"
    except SignalError as error:
        return signal_word(error)
