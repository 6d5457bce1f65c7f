"""Many seeds: one after the other, on several processes, or over a dask scheduler; what they found, together.

A seed is independent of every other, so they are handed out one by one, and results are taken as they come. Whoever interrupts a
campaign gets what was found so far.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import msgspec

from hmmnet.errors import HmmnetError

from .draw import DEVICES, OPERATIONS, draw
from .trial import run_program
from .workers import workers

UNCOLLECTED_MAX = 40_000
"""Objects that may come to stay before garbage is looked for: what some six seeds leave in circles, which is some tens of megabytes."""
OLDER_MAX = (20, 20)

Each = Callable[[int], "Found"]
"""Runs one seed."""
NOBODY_S = 3.0
"""A dask scheduler whose workers are still starting has one by then; after that it is said that there is none."""
AHEAD = 4
"""Seeds handed to each worker before the first is back: none waits, and little is lost when somebody interrupts."""


class Found(msgspec.Struct, frozen=True):
    """What one seed came to: plain data, to be sent between processes. `violations` are (checker, what)."""

    seed: int
    operations: int
    faults: dict[str, int]
    violations: list[tuple[str, str]]
    seconds: float


@dataclass
class Summary:
    """What all seeds came to so far."""

    mix: str
    seeds: int = 0
    operations: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    began_s: float = field(default_factory=time.perf_counter)

    def add(self, found: Found) -> None:
        """One more seed."""
        self.seeds += 1
        self.operations += found.operations
        self.faults.update(found.faults)
        self.violations += [{"seed": found.seed, "checker": checker, "what": what} for checker, what in found.violations]
        self.seconds = time.perf_counter() - self.began_s

    def as_json(self) -> dict[str, Any]:
        """Plain data, as ``--json`` prints it."""
        return {
            "seeds": self.seeds,
            "operations": self.operations,
            "faults": dict(sorted(self.faults.items())),
            "violations": sorted(self.violations, key=lambda one: int(one["seed"])),
            "seconds": round(self.seconds, 3),
        }


def collect_rarely() -> None:
    """From now on garbage in circles is looked for rarely, and not among what there is already: that is here to stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(UNCOLLECTED_MAX, *OLDER_MAX)


@contextmanager
def rarely_collected() -> Iterator[None]:
    """`collect_rarely`, while the block runs."""
    before = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def try_seed(seed: int, mix: str = "all", operations: int = OPERATIONS, devices: int = DEVICES) -> Found:
    """Run one seed."""
    began_s = time.perf_counter()
    outcome = run_program(draw(seed, mix, operations, devices)).outcome
    violations = [(one.checker, one.what) for one in outcome.violations]
    return Found(seed, outcome.operations, dict(outcome.faults), violations, time.perf_counter() - began_s)


def replay_command(seed: int, mix: str, operations: int = OPERATIONS, devices: int = DEVICES) -> str:
    """The one command that repeats a seed."""
    own = f"'{mix}'" if " " in mix else mix
    others = (("operations", operations, OPERATIONS), ("devices", devices, DEVICES))
    return f"hmmnet replay {seed} --faults {own}" + "".join(f" --{name} {value}" for name, value, usual in others if value != usual)


def run_campaign(
    seeds: Iterable[int],
    mix: str = "all",
    operations: int = OPERATIONS,
    devices: int = DEVICES,
    *,
    jobs: int = 1,
    dask: str = "",
    on_found: Callable[[Summary, Found], None] = lambda _, __: None,
    summary: Summary | None = None,
) -> Summary:
    """Run all `seeds`, on `jobs` processes or over the dask scheduler at address `dask`. `on_found` is told of each as it ends.

    `summary`, if it is given, is filled as it goes: what there is when this is interrupted. Raises HmmnetError: no such mix, no dask.
    """
    summary = Summary(mix) if summary is None else summary
    draw(0, mix, operations, devices)
    each = partial(try_seed, mix=mix, operations=operations, devices=devices)
    with _results(list(seeds), each, jobs, dask) as results:
        for found in results:
            summary.add(found)
            on_found(summary, found)
    return summary


@contextmanager
def _results(seeds: list[int], each: Each, jobs: int, dask: str) -> Iterator[Iterable[Found]]:
    jobs = min(jobs, len(seeds))
    if dask:
        with _over_dask(seeds, each, dask) as found:
            yield found
    elif jobs <= 1:
        with rarely_collected():
            yield map(each, seeds)
    else:
        with workers(jobs, collect_rarely) as pool:
            yield _pooled(pool, seeds, each, jobs)


def _pooled(pool: ProcessPoolExecutor, seeds: list[int], each: Each, jobs: int) -> Iterator[Found]:
    """A few seeds ahead of what the workers do."""
    left = iter(seeds)
    under_way = {pool.submit(each, seed) for seed in islice(left, jobs * AHEAD)}
    while under_way:
        done = next(as_completed(under_way))
        under_way.discard(done)
        for seed in left:
            under_way.add(pool.submit(each, seed))
            break
        yield done.result()


@contextmanager
def _over_dask(seeds: list[int], each: Each, address: str) -> Iterator[Iterable[Found]]:
    """Results from the workers of a dask scheduler, which must have hmmnet installed. Raises HmmnetError."""
    try:
        from distributed import Client
        from distributed import as_completed as as_they_come
    except ImportError:
        raise HmmnetError('--dask needs the package "distributed"; install it (pip install distributed) here and on the workers') from None
    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise HmmnetError(f"no dask scheduler answers at {address}: {error}") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=NOBODY_S)
        except TimeoutError:
            print(f"the dask scheduler at {address} has no worker yet; waiting for one (Ctrl-C ends it)", file=sys.stderr, flush=True)
        futures = client.map(each, seeds, pure=False)
        try:  # the client is nobody's default, so that its loop has to be said
            yield (future.result() for future in as_they_come(futures, loop=client.loop))
        finally:
            client.cancel(futures)
