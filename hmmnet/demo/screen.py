"""The demo as a person sees it: one line for each step while it happens, then the tables.

A step's line says what was done, how long it took in emulated time and what it cost in faults; a question stands where its answer can be
seen in the lines around it. Nothing waits for the end of the run except the tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hmmnet.observe.counters import Profile
from hmmnet.observe.profiler_table import profiler_table
from hmmnet.observe.residency import ABSENT, Sample, terminal_picture
from hmmnet.pages import PAGE_SIZE
from hmmnet.units import show_rate, show_size, show_time

from .conduct import Outcome, Started
from .data import Input
from .steps import DEMAND, Asked, Built, Checked, Event, Moved, Ran, Sampled
from .story import Question

LABEL_WIDTH = 10
WIDTH_MAX = 110
"""Lines longer than this are hard to read, however wide the terminal."""
DEVICES_NAMED = 8
PICTURE_ROWS = 6
PICTURE_COLUMN_MIN = 4
PICTURE_COLUMN_MAX = 14
KERNELS = {"word_count": "word count", "tree_search": "tree search"}


class Screen:
    """Prints events as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._width = min(console.width, WIDTH_MAX)
        self._text = b""
        self._demand_s: dict[str, float] = {}
        self.samples: list[Sampled] = []

    def reading(self, given: Input, topology: str) -> None:
        """What goes in, before anything has started."""
        self._text = given.text
        self.line("input", f"{show_size(len(given.text))} of text: {escape(given.source)}")
        self.line("machine", f"{escape(topology)}: starting a host and its devices")

    def started(self, started: Started) -> None:
        """The machine is up."""
        devices = started.devices if len(started.devices) <= DEVICES_NAMED else (*started.devices[:2], "...", started.devices[-1])
        self.line("", f"{', '.join(devices)} ready after {started.seconds:.1f} s; one real second is {show_time(started.rate)} emulated")
        answers = started.answers
        common = ", ".join(f"{word} {count:,}" for word, count in answers.most_common(self._text, 4, 3))
        self.line("Python", f"{answers.words:,} words, {len(answers.counts):,} different ones ({escape(common)}): what the GPUs must find")

    def finished(self, outcome: Outcome) -> None:
        """The tables, the picture and the verdict."""
        self._console.print()
        self._console.print(profiler_table(Profile.from_json(outcome.report.get("profile", []))))
        self._console.print()
        self._console.print(Text("Where the pages live", style="italic"))
        self._console.print(picture(self.samples, self._width))
        self._console.print()
        links = outcome.report.get("links", [])
        self._console.print(links_table(links))
        self._console.print()
        self._console.print(Text.from_markup(verdict(outcome)), highlight=False, width=self._width)

    def line(self, label: str, text: str) -> None:
        """One line under a label; a long one goes on under itself."""
        body = Text.from_markup(text)
        rows = body.wrap(self._console, max(20, self._width - LABEL_WIDTH))
        for i, row in enumerate(rows):
            head = Text(f"{label if i == 0 else '':<{LABEL_WIDTH}}", style="bold")
            self._console.print(head + row, highlight=False)

    def tell(self, event: Event) -> None:
        """Print one event."""
        if isinstance(event, Built):
            self._built(event)
        elif isinstance(event, Asked):
            self._asked(event.question)
        elif isinstance(event, Ran):
            self._ran(event)
        elif isinstance(event, Moved):
            self._moved(event)
        elif isinstance(event, Checked):
            self._checked(event)
        else:
            self.samples.append(event)

    def _asked(self, question: Question) -> None:
        self._console.print()
        self._console.print(Text(f"? {question.asked}", style="bold cyan"))
        self._console.print(Padding(Text(question.answer), (0, 0, 0, 2)), width=self._width)
        self._console.print()

    def _built(self, event: Built) -> None:
        size_bytes = sum(area.size_bytes for area in event.data.areas)
        share = event.data.shares[0]
        self.line(
            "CPU",
            f"text, word lists, a search tree of {len(event.data.words):,} nodes and {event.searches:,} searches stored in CPU memory",
        )
        self.line(
            "",
            f"[dim]{show_size(size_bytes)} at ordinary addresses; 0x{share.root:x}, a tree node, is a pointer to CPU and GPUs alike[/dim]",
        )

    def _ran(self, event: Ran) -> None:
        faults = sum(figure(job.counters, "fault_groups") for job in event.jobs.values())
        fetched = PAGE_SIZE * sum(figure(job.counters, "pages_in") for job in event.jobs.values())
        cost = f"{faults:,.0f} fault groups" + (f", {show_size(fetched)} fetched" if fetched else "") if faults else "no fault"
        earlier = self._demand_s.get(KERNELS[event.kernel])
        faster = (
            f"  [green]{earlier / event.seconds:.1f} times as fast[/green]" if event.run != DEMAND and earlier and event.seconds else ""
        )
        if event.run == DEMAND:
            self._demand_s[KERNELS[event.kernel]] = event.seconds
        label = " and ".join(event.jobs) if len(event.jobs) < 3 else f"{len(event.jobs)} GPUs"
        self.line(
            "GPUs",
            f"{KERNELS[event.kernel]:<11}  {event.run:<15}  {show_time(event.seconds):>8}  {cost}{faster}  [dim]{escape(label)}[/dim]",
        )

    def _moved(self, event: Moved) -> None:
        speed = show_rate(event.moved_bytes / event.seconds) if event.seconds > 0 else "-"
        where = "home to the CPU" if event.to == "host" else "each GPU's part to it"
        self.line("migrate", f"{where:<28}  {show_time(event.seconds):>8}  {show_size(event.moved_bytes)} at {speed}")

    def _checked(self, event: Checked) -> None:
        oracle = {"word_count": "Counter", "tree_search": "dict"}[event.kernel]
        verdict = f"[green]{event.results:,} results, all as Python's {oracle} has them[/green]"
        if event.wrong:
            verdict = f"[red]{event.wrong:,} of {event.results:,} results are wrong[/red]"
        self.line("CPU reads", f"{KERNELS[event.kernel]:<11}  {event.run:<15}  {show_time(event.seconds):>8}  {verdict}")
        if event.pages_from_devices:
            self.line("", f"[dim]{event.pages_from_devices:,} pages came home for it[/dim]")


def picture(samples: Sequence[Sampled], width: int) -> Text:
    """The pages of all areas, by owner, at each moment."""
    columns = [Sample(sample.emulated_s, pages_by_owner(sample), sample.moment) for sample in samples]
    column_width = max(PICTURE_COLUMN_MIN, width // max(len(columns), 1) - 1)
    labelled = all(len(sample.label) <= column_width for sample in columns)
    drawn = terminal_picture(columns, PICTURE_ROWS, min(column_width, PICTURE_COLUMN_MAX), labelled)
    if not labelled:
        drawn.append("\n" + "  ".join(f"{i} {sample.label}" for i, sample in enumerate(columns, 1)), style="dim")
    return drawn


def pages_by_owner(sample: Sampled) -> dict[str, int]:
    """How many pages each owner holds, all areas together; the host first."""
    pages: Counter[str] = Counter()
    for _, residency in sample.areas:
        for i, owner in enumerate(residency.owners):
            pages[owner] += int((residency.pages == i).sum())
        pages[ABSENT] += int((residency.pages == -1).sum())
    return {owner: count for owner, count in pages.items() if count or owner == ABSENT}


def links_table(links: Sequence[Mapping[str, Any]]) -> Table:
    """Each direction of each link that carried something."""
    table = Table(title="Links (emulated time)", title_justify="left", box=None, pad_edge=False)
    for heading in ("Link", "From", "To"):
        table.add_column(heading)
    for heading in ("Carried", "Can do", "Asked", "Reached"):
        table.add_column(heading, justify="right")
    table.add_column("Emulation")
    for link in links:
        if link["bytes_moved"]:
            speeds = (show_rate(link[f"{name}_bytes_per_s"]) for name in ("capacity", "asked", "reached"))
            kept = "[green]kept up[/green]" if link["kept_up"] else "[yellow]fell behind[/yellow]"
            table.add_row(link["link"], link["source"], link["target"], show_size(link["bytes_moved"]), *speeds, kept)
    return table


def verdict(outcome: Outcome) -> str:
    """The last line."""
    checked = sum(fact["results"] for fact in outcome.facts if fact["step"] == "check")
    end = f"{outcome.seconds:.1f} s"
    behind = [link for link in outcome.report.get("links", []) if link["bytes_moved"] and not link["kept_up"]]
    note = ""
    if behind:
        note = f" The emulation fell behind on {len(behind)} links: their transfers took longer than the real ones would."
    if outcome.correct:
        return f"[bold green]RIGHT[/bold green] All {checked:,} results are what plain Python computes, in {end}.{note}"
    return f"[bold red]WRONG[/bold red] {escape('; '.join(outcome.mistakes))} ({end}).{note}"


def figure(counters: Mapping[str, Any], name: str) -> float:
    """A job's counter, 0 when the device does not count it."""
    value = counters.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0
