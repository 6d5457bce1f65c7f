"""The systematic sweep: one fault at a time, at every protocol point and every message in turn, until nothing is left.

As the kernel's fail-nth: with *n* = 1, 2, 3 ... the *n*-th time that a point is reached (or the *n*-th message of a kind) is the one that
is hit, and the sweep of that pair ends when a whole run goes by without a hit. No chance is left: what the scenario can reach is hit. Only
points that are reached once for each page of a huge page are not hit at all of them: one of its pages is like another.

Up to the hit a run is as without it, and costs as much. So where it can be, one run is made for all times of a pair, and a child is forked
off at each, in which the fault happens (`forks`).

After each hit everything is healed, and everything that a campaign demands must hold. How a run ended, compared with the scenario alone:

- ``same``: as many operations ended well;
- ``refused``: some operation ended with an error that says why, nothing is lost;
- ``lost``: pages whose only copy died with a device were lost, and said so;
- ``wrong``: a violation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from hmmnet.faults.controls import EVERY
from hmmnet.faults.points import HOSTS_OWN

from .campaign import collect_rarely, rarely_collected
from .crew import Outcome
from .forks import Forks, can_fork
from .machines import topology_of
from .nemesis import BYE, LETHAL
from .places import Pair, pairs
from .program import Program
from .trial import Verdict, run_program
from .words import DEATH
from .workers import workers

OUTCOMES = ("same", "refused", "lost", "wrong")
NTH_MAX = 500
"""Hits of one pair in one scenario: what goes on for longer goes on without an end."""
PER_PAGE = frozenset({"migrate.after_entry", "migrate.trylock", "migrate.count", "migrate.insert"})
"""Points inside loops over pages."""
PAGES_EACH = 12
"""So many pages are hit one by one; from there on each is twice as far as the last."""
AHEAD = 4
"""Pieces of work handed to each worker before its first is back."""


@dataclass
class Cell:
    """What came of one pair over all scenarios."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Violations, each with how to repeat it."""

    @property
    def hits(self) -> int:
        """How often it was hit."""
        return sum(self.outcomes.values())


@dataclass(frozen=True)
class Hits:
    """One run: whether its fault happened, and how it ended."""

    hit: bool
    outcome: str
    wrong: str = ""


@dataclass(frozen=True)
class Tried:
    """One run of a sweep."""

    pair: Pair
    scenario: str
    nth: int
    """Which time; from `EVERY` on: the run in which it never happened."""
    found: Hits

    @property
    def when(self) -> str:
        """Which time, in words."""
        return f"nth={self.nth}" if self.nth < EVERY else "without the fault"


@lru_cache(maxsize=64)
def alone(base: Program) -> Outcome:
    """The scenario without the fault: what it reaches, and how it ends."""
    return run_program(base, count=True).outcome


def try_pair(pair: Pair, base: Program, nth: int) -> Hits:
    """Run the scenario with that fault at that time."""
    return _judged(pair, alone(base), run_program(pair.program(base, nth)))


def _judged(pair: Pair, before: Outcome, verdict: Verdict) -> Hits:
    """What came of a run, compared with the scenario `before`."""
    outcome = verdict.outcome
    name = f"{pair.action} at {pair.place}" if pair.kind == "point" else "message" if pair.fault == DEATH else pair.fault
    hit = outcome.faults[name] > before.faults[name]
    if verdict.violations:
        return Hits(hit, "wrong", f"{verdict.violations[0].checker}: {verdict.violations[0].what}")
    return Hits(hit, "lost" if outcome.lost > before.lost else "refused" if outcome.refused > before.refused else "same")


def try_all(pair: Pair, bases: list[Program], nth_max: int, *, first_only: bool) -> list[Tried]:
    """The pair in these scenarios, each time; `first_only`: once a scenario has hit it, the others are not tried."""
    tried: list[Tried] = []
    for base in bases:
        tried += [Tried(pair, base.mix, nth, found) for nth, found in _until_missed(pair, base, nth_max)]
        if first_only and tried:
            break
    return tried


def _until_missed(pair: Pair, base: Program, nth_max: int) -> Iterator[tuple[int, Hits]]:
    if not alone(base).reached[pair.place] and pair.place != BYE:
        return  # up to the hit a run is as without it: what is never reached cannot be hit
    if nth_max > 1 and can_fork(base.machine):
        yield from forked(pair, base, nth_max)
        return
    for nth in _times(pair, nth_max):
        found = try_pair(pair, base, nth)
        if found.hit or found.outcome == "wrong":
            yield nth, found
        if not found.hit:
            return


def _times(pair: Pair, nth_max: int) -> Iterator[int]:
    """Which times are hit, if there are so many."""
    nth = 0
    while (nth := nth * 2 if pair.place in PER_PAGE and nth >= PAGES_EACH else nth + 1) <= nth_max:
        yield nth


def forked(pair: Pair, base: Program, nth_max: int) -> list[tuple[int, Hits]]:
    """The pair at each time: what `try_pair` says of each, from one run (`forks`), or one for each device that may be meant.

    What is wrong in such a run itself comes last, with an nth of `EVERY` or more. Raises HmmnetError when a child fails or dies.
    """
    before, wanted = alone(base), frozenset(_times(pair, nth_max))
    devices = len(topology_of(base.machine).device_names) if pair.action in LETHAL and pair.place.startswith(HOSTS_OWN) else 1
    found: list[tuple[int, Hits]] = []
    for turn in range(devices):  # at points that concern no device, the `nth` of all devices is meant
        forks: Forks[Hits] = Forks(frozenset(nth for nth in wanted if nth % devices == turn))
        own = forks.run(lambda: _judged(pair, before, run_program(pair.program(base, EVERY + turn))))  # noqa: B023 - it is called here
        found += [(nth, hits) for nth, hits in forks.results if hits.hit or hits.outcome == "wrong"]
        if own.outcome == "wrong":
            found.append((EVERY + turn, own))
    return sorted(found, key=lambda one: one[0])


def expected(scenarios: list[Program], chosen: list[Pair], nth_max: int, *, first_only: bool) -> int:
    """How many hits `sweep` tries, at most: each pair as often as a scenario by itself comes to its place."""
    total = 0
    for pair in chosen:
        for base in scenarios:
            reached = alone(base).reached[pair.place]
            total += sum(1 for _ in _times(pair, min(nth_max, reached)))
            if reached and first_only:
                break
    return total


def sweep(
    scenarios: list[Program],
    *,
    chosen: list[Pair] | None = None,
    nth_max: int = NTH_MAX,
    first_only: bool = False,
    jobs: int = 1,
    on_done: Callable[[int, int, list[Tried]], None] = lambda *_: None,
    table: dict[Pair, Cell] | None = None,
) -> dict[Pair, Cell]:
    """Every pair (or the `chosen`), in every scenario, at every time up to `nth_max`, on `jobs` processes.

    `first_only`: once a scenario has hit a pair, the others are not tried. `on_done` is told of each piece of work, in order: which, of how
    many, and its runs. `table`, if it is given, is filled as it goes: what there is when this is interrupted.
    """
    table = {} if table is None else table
    table |= {pair: Cell() for pair in (pairs() if chosen is None else chosen)}
    groups = [scenarios] if first_only else [[base] for base in scenarios]
    work = [(pair, group, nth_max, first_only) for pair in table for group in groups]
    with _results(work, jobs) as results:
        for number, tried in enumerate(results, 1):
            for one in tried:
                cell = table[one.pair]
                cell.outcomes[one.found.outcome] += 1
                if one.found.outcome == "wrong":
                    cell.wrong.append(f"{one.scenario} {one.when}: {one.found.wrong}")
            on_done(number, len(work), tried)
    return table


Work = tuple[Pair, list[Program], int, bool]


def _do(work: Work) -> list[Tried]:
    pair, bases, nth_max, first_only = work
    return try_all(pair, bases, nth_max, first_only=first_only)


@contextmanager
def _results(work: list[Work], jobs: int) -> Iterator[Iterator[list[Tried]]]:
    """The runs of each piece of work, in order."""
    jobs = min(jobs, len(work))
    if jobs <= 1:
        with rarely_collected():
            yield map(_do, work)
        return
    with workers(jobs, collect_rarely) as pool:
        yield _pooled(pool, iter(work), jobs * AHEAD)


def _pooled(pool: ProcessPoolExecutor, left: Iterator[Work], ahead: int) -> Iterator[list[Tried]]:
    under_way: list[Future[list[Tried]]] = [pool.submit(_do, one) for one in islice(left, ahead)]
    while under_way:
        done = under_way.pop(0).result()
        under_way += [pool.submit(_do, one) for one in islice(left, 1)]
        yield done
