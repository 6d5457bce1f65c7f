"""``hmmnet selftest [NAME...]``: the kernel's own tests of HMM, by name."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .plans import FaultsFile, plan_for
from .worlds import WORLD_HELP, World

if TYPE_CHECKING:
    from rich.console import Console

    from hmmnet.selftest.runner import Case, Outcome


class Kind(StrEnum):
    """Which units are tested."""

    private = "private"
    coherent = "coherent"


class Personality(StrEnum):
    """Whose rules the machine keeps."""

    today = "today"
    v25 = "v25"


def selftest(
    names: Annotated[list[str] | None, typer.Argument(help="Tests to run; all when none is named.", show_default=False)] = None,
    kind: Annotated[
        Kind | None, typer.Option(help="Memory of the devices: private or coherent. Both when left out.", show_default=False)
    ] = None,
    personality: Annotated[
        Personality, typer.Option(help="Whose rules: today (the present kernel's), or v25 (HMM's first, 2017).")
    ] = Personality.today,
    world: Annotated[World, typer.Option(help=WORLD_HELP)] = World.real,
    seed: Annotated[int, typer.Option(help="What chances of faults are drawn from; with --world sim the order of events, too.")] = 0,
    faults: FaultsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of results for programs.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Name the tests and what they check; run nothing.")] = False,
) -> int:
    """Run the kernel's 39 self-tests of HMM, written anew, on private and on coherent memory.

    Under v25 the same names are run; those of what came later (exclusive access, huge pages that migrate ...) are skipped as "modern only".

    Exit code 0 only if none fails, 1 if one does, 2 for a name that there is not.
    """
    from functools import partial

    from hmmnet.cli import did_you_mean
    from hmmnet.errors import WrongUse
    from hmmnet.play.world import TOPOLOGY, real_world, simulated_world
    from hmmnet.selftest.runner import KINDS, ORDER, cases, run_all
    from hmmnet.sim.worlds import run_in
    from hmmnet.topology.load import load

    for name in names or ():
        if name not in ORDER:
            raise WrongUse(f'there is no self-test "{name}"{did_you_mean(name, ORDER)}; "hmmnet selftest --list" names them')
    if listed:
        _list(as_json=as_json)
        return 0
    chosen = cases(names or (), KINDS if kind is None else (kind.value,))
    plan = plan_for(faults, world.value, load(TOPOLOGY))
    screen = Screen(chosen, quiet=as_json)
    try:
        rules: Literal["today", "v25"] = "v25" if personality is Personality.v25 else "today"
        launch = partial(simulated_world if world is World.sim else real_world, rules, seed)
        with plan.telling():
            outcomes = run_in(world.value, run_all, chosen, screen.on_outcome, plan.world(launch), rules, seed=seed)
    finally:
        screen.done()
    if as_json:
        json.dump([outcome.as_json() for outcome in outcomes], sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        screen.summary(outcomes, personality.value)
    if plan:
        print(plan.text, file=sys.stderr if as_json else sys.stdout)
    return 1 if any(outcome.result == "fail" for outcome in outcomes) else 0


def _list(*, as_json: bool) -> None:
    from hmmnet.observe.hanging import hang
    from hmmnet.selftest.case import TESTS
    from hmmnet.selftest.runner import ORDER

    told = {name: (TESTS[name].__doc__ or "").partition("\n")[0] for name in ORDER}
    if as_json:
        print(json.dumps([{"name": name, "what": what} for name, what in told.items()], indent=1))
        return
    width = max(map(len, ORDER)) + 2
    for name, what in told.items():
        print(hang(f"{name:<{width}}", what))


class Screen:
    """A line for each case as it ends, and a count at the end. For programs (`quiet`) only what is not well is shown, on stderr."""

    def __init__(self, chosen: list[Case], *, quiet: bool) -> None:
        from rich.console import Console

        self._console: Console = Console(stderr=quiet, highlight=False)
        self._quiet = quiet
        self._total = len(chosen)
        self._done = 0
        self._width = max((len(case.name) for case in chosen), default=0)
        self._status = self._console.status(f"starting a machine for {self._total} cases") if self._console.is_terminal else None
        if self._status is not None:
            self._status.start()

    def on_outcome(self, outcome: Outcome) -> None:
        """One case has ended."""
        self._done += 1
        colour = {"pass": "green", "fail": "red", "skip": "yellow"}[outcome.result]
        if not self._quiet or outcome.result != "pass":
            name, kind = outcome.case.name.ljust(self._width), outcome.case.kind.ljust(8)
            self._console.print(f"[{colour}]{outcome.result}[/]  {name}  {kind}  {outcome.seconds:6.2f} s", soft_wrap=True)
            for line in (outcome.why, *outcome.notes):
                if line:
                    self._console.print(f"      {line}", markup=False, soft_wrap=True)
        if self._status is not None:
            self._status.update(f"{self._done} of {self._total}: {outcome.case.name}, {outcome.case.kind}")

    def done(self) -> None:
        """Clear the line."""
        if self._status is not None:
            self._status.stop()

    def summary(self, outcomes: list[Outcome], personality: str) -> None:
        """How many passed."""
        count = {result: sum(outcome.result == result for outcome in outcomes) for result in ("pass", "fail", "skip")}
        seconds = sum(outcome.seconds for outcome in outcomes)
        counts = f"{count['pass']} of {len(outcomes)} cases pass, {count['fail']} fail, {count['skip']} are skipped"
        text = f"{counts} ({personality}; {seconds:.1f} s)"
        self._console.print(f"\n[{'red' if count['fail'] else 'green'}]{text}[/]", soft_wrap=True)
