"""``hmmnet campaign``: many seeds, each a machine in virtual time with its own work and faults."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from hmmnet.observe.hanging import hang
from hmmnet.units import counted

from . import options_given

if TYPE_CHECKING:
    from hmmnet.campaign.campaign import Found, Summary
    from hmmnet.campaign.real import Summary as RealSummary


class World(StrEnum):
    """Where a campaign runs."""

    sim = "sim"
    real = "real"


SEEDS_MAX = 10_000_000
MIX = "all, none, messages, deaths, partitions or points; or a family or kind of faults (hmmnet fault kinds)."
OF_A_WORLD = {World.sim: ("faults", "jobs", "dask", "operations", "devices"), World.real: ("rounds", "cables")}
"""Options that mean nothing in the other world."""
SHOWN_MAX = 20
"""Violations that are told in full; the rest are counted."""


def campaign(
    context: typer.Context,
    seeds: Annotated[str, typer.Option(help="Which: A:B from A up to but not B, or one number.", show_default=True)] = "0:100",
    faults: Annotated[str, typer.Option(metavar="MIX", help=MIX)] = "all",
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Processes.")] = 1,
    dask: Annotated[
        str, typer.Option(metavar="ADDRESS", help="A dask scheduler instead, such as tcp://HOST:8786.", show_default=False)
    ] = "",
    operations: Annotated[int, typer.Option(min=1, max=100_000, help="Operations of a seed.")] = 200,
    devices: Annotated[int, typer.Option(min=0, max=64, help="Devices of a machine; 0: each seed draws 1 to 4.")] = 4,
    world: Annotated[
        World, typer.Option(help="sim: in virtual time, from the seeds; real: on processes, from one seed on, in rounds.")
    ] = World.sim,
    rounds: Annotated[int, typer.Option(min=1, max=1_000_000, help="Rounds of --world real: kill, stop, or spoil a cable.")] = 100,
    cables: Annotated[bool, typer.Option("--cables", help="Of --world real: devices behind cables that are cut and spoilt.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Run random work and random faults from seeds, heal everything, and demand that every word is right and nothing has leaked.

    Each seed is a run of its own that can be repeated: a violation prints the command. Exit code 1 when there is one, 2 for what cannot be
    run. Ctrl-C prints what was found so far.
    """
    given = options_given(context)
    _check_together(world, given, seeds)
    if world is World.real:
        return _real(seeds_of(seeds)[0], rounds, cables=cables, as_json=as_json)
    from hmmnet.campaign.campaign import Summary, replay_command, run_campaign

    wanted = seeds_of(seeds)
    summary = Summary(faults)
    screen = _Screen(len(wanted), partial(replay_command, mix=faults, operations=operations, devices=devices))
    interrupted = False
    try:
        run_campaign(wanted, faults, operations, devices, jobs=jobs, dask=dask, on_found=screen.found, summary=summary)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        screen.done()
    if as_json:
        json.dump(summary.as_json(), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        _tell(summary)
    return 130 if interrupted else 1 if summary.violations else 0


def _check_together(world: World, given: set[str], seeds: str) -> None:
    """Raises WrongUse for options among `given` that would be passed over."""
    from hmmnet.errors import WrongUse

    other = World.real if world is World.sim else World.sim
    strange = [f"--{name}" for name in OF_A_WORLD[other] if name in given]
    if strange:
        own = ", ".join(f"--{name}" for name in ("seeds", *OF_A_WORLD[world]))
        raise WrongUse(f"{', '.join(strange)} mean{'s' * (len(strange) == 1)} nothing in --world {world.value}, which has {own}")
    if world is World.real and "seeds" in given and len(seeds_of(seeds)) > 1:
        first = seeds_of(seeds)[0]
        raise WrongUse(f"--world real begins with one seed, and --rounds says how far it goes: write --seeds {first}, not {seeds}")
    if {"dask", "jobs"} <= given:
        raise WrongUse("--jobs means nothing with --dask, whose scheduler has workers of its own: leave one of them out")


def _real(seed: int, rounds: int, *, cables: bool, as_json: bool) -> int:
    """Rounds on real processes."""
    if cables:
        from hmmnet.cable.namespaces import isolate

        isolate()
    import trio

    from hmmnet.campaign.real import Summary, run_rounds

    summary = Summary()

    def told(so_far: Summary) -> None:
        line = f"{so_far.rounds} of {rounds} rounds, {so_far.operations} operations, {len(so_far.violations)} violations"
        print(line, file=sys.stderr, flush=True)

    interrupted = False
    try:
        trio.run(lambda: run_rounds(seed, rounds, cables=cables, summary=summary, on_batch=told))
    except* KeyboardInterrupt:
        interrupted = True
    if as_json:
        json.dump(summary.as_json(), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        _tell_real(summary)
    return 130 if interrupted else 1 if summary.violations else 0


def _tell_real(summary: RealSummary) -> None:
    figures = summary.as_json()
    faults = ", ".join(f"{count} {kind}" for kind, count in figures["faults"].items()) or "none"
    print(f"{counted(figures['rounds'], 'round')}, {counted(figures['operations'], 'operation')} in {figures['seconds']:.0f} s")
    print(hang("faults: ", faults))
    pages, left = figures["lost_pages"], figures["processes_left"]
    died = "1 page died with the only device that had it" if pages == 1 else f"{pages} pages died with the only device that had them"
    print(f"{died}; {left} process{'es are' if left != 1 else ' is'} left")
    for violation in figures["violations"][:SHOWN_MAX]:
        print(f"seed {violation['seed']}: {violation['checker']}: {violation['what']}")
    print(counted(len(figures["violations"]), "violation") if figures["violations"] else "no violation")


def seeds_of(text: str) -> range:
    """``A:B`` or ``N``. Raises WrongUse."""
    from hmmnet.errors import WrongUse

    found = re.fullmatch(r"(\d{1,12})(?::(\d{1,12}))?", text)
    first, last = (int(found[1]), int(found[2] or int(found[1]) + 1)) if found else (0, 0)
    if not 0 < last - first <= SEEDS_MAX:
        raise WrongUse(f'"{text}" names no seeds; write A:B with A smaller than B (at most {SEEDS_MAX} seeds), or one number')
    return range(first, last)


class _Screen:
    """Progress on stderr: a line that is written over on a terminal, one line now and then elsewhere; violations as they are found."""

    def __init__(self, total: int, again: Callable[..., str]) -> None:
        self._total = total
        self._again = again
        self._told = 0
        self._live = sys.stderr.isatty()
        self._every = 1 if self._live else max(1, total // 10)

    def found(self, summary: Summary, found: Found) -> None:
        """One more seed."""
        for checker, what in found.violations[:1]:
            self._told += 1
            if self._told <= SHOWN_MAX:
                self._clear()
                print(f"seed {found.seed}: {checker}: {what}\n  again: {self._again(found.seed)}", file=sys.stderr)
        if summary.seeds % self._every == 0 or summary.seeds == 1:
            rate = summary.operations / max(summary.seconds, 1e-9)
            line = f"{summary.seeds} of {self._total} seeds, {rate:.0f} operations/s, {len(summary.violations)} violations"
            print(f"\r\x1b[K{line}" if self._live else line, file=sys.stderr, end="" if self._live else "\n", flush=True)

    def done(self) -> None:
        """No line is left half."""
        self._clear()

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[K", file=sys.stderr, end="", flush=True)


def _tell(summary: Summary) -> None:
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.faults.items())) or "none"
    print(f"{counted(summary.seeds, 'seed')}, {counted(summary.operations, 'operation')} in {summary.seconds:.1f} s")
    print(hang("faults: ", faults))
    bad = sorted({int(one["seed"]) for one in summary.violations})
    if bad:
        where = f"{counted(len(bad), 'seed')}: {', '.join(map(str, bad[:SHOWN_MAX]))}"
        print(f"{counted(len(summary.violations), 'violation')} in {where}")
    else:
        print("no violation")
