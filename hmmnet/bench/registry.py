"""The benchmarks by name, and who measures each.

A *suite* is a function in one of the files beside this one; it measures one or several figures in one interleaved run, because figures that
share a reference must be measured with it. Names of figures are the public interface (`hmmnet bench NAME`, and what is compared over time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

from hmmnet.errors import HmmnetError

from .measurement import Measurement


@dataclass(frozen=True)
class Suite:
    """`function` of module `hmmnet.bench.<module>` measures `figures`."""

    module: str
    function: str
    figures: tuple[str, ...]

    def load(self) -> Callable[[], list[Measurement]]:
        """The function; imported only now, so that listing the names costs nothing."""
        function: Callable[[], list[Measurement]] = getattr(import_module(f"hmmnet.bench.{self.module}"), self.function)
        return function


SUITES = (
    Suite("wire", "round_trips", ("bridge.rtt", "bridge.vs_asyncio_rtt", "session.rtt")),
    Suite("wire", "streams", ("bridge.stream_1m", "bridge.vs_asyncio_stream")),
    Suite("wire", "control_under_bulk", ("control.under_bulk",)),
    Suite("dma", "measure_dma", ("dma.to_device", "dma.to_host")),
    Suite("dma", "measure_throttle", ("throttle.50", "throttle.200", "throttle.500")),
    Suite("host", "measure_migration", ("migrate.to_device", "migrate.to_host", "fault.cpu_home")),
    Suite("host", "measure_bookkeeping", ("snapshot.ns_per_page", "migrate.bookkeeping_ns_per_page")),
    Suite("machine", "measure_start", ("start.2_devices", "start.8_devices", "start.64_devices", "device.private_mb")),
)


def figure_names() -> list[str]:
    """Every figure, in the order in which they are measured."""
    return [name for suite in SUITES for name in suite.figures]


def select(name: str | None) -> list[Suite]:
    """The suites that measure `name`: a figure, or a group such as ``bridge``; all without a name. Raises HmmnetError with a guess."""
    if name is None:
        return list(SUITES)
    chosen = [suite for suite in SUITES if any(figure == name or figure.startswith(name + ".") for figure in suite.figures)]
    if not chosen:
        known = figure_names() + sorted({figure.split(".")[0] for figure in figure_names()})
        guess = get_close_matches(name, known, n=1)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise HmmnetError(f"no benchmark is called {name!r}{hint} (names: {', '.join(figure_names())})")
    return chosen


def run(name: str | None, announce: Callable[[Suite], None]) -> Iterator[Measurement]:
    """Measure what `select` gives, one suite after another; `announce` is told before each, because each takes seconds."""
    for suite in select(name):
        announce(suite)
        for measurement in suite.load()():
            if name is None or measurement.name == name or measurement.name.startswith(name + "."):
                yield measurement
