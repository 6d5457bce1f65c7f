"""The demo as a person sees it: one line for each step while it happens, then the tables.

A step's line says what was done, how long it took in emulated time and what it cost in faults; a question stands where its answer can be
seen in the lines around it. Nothing waits for the end of the run except the tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.text import Text

from hmmnet.observe.counters import Profile
from hmmnet.observe.fitted import Fitted
from hmmnet.observe.links_table import links_table
from hmmnet.observe.profiler_table import profiler_table
from hmmnet.observe.residency import ABSENT, Sample, folded, terminal_picture
from hmmnet.pages import PAGE_SIZE
from hmmnet.units import counted, show_rate, show_size, show_time

from .answers import Answers
from .conduct import Outcome, Started
from .data import Input
from .steps import DEMAND, Asked, Built, Checked, Counted, Event, Found, Moved, Ran, Sampled
from .story import Question

LABEL_WIDTH = 9
WIDTH_MAX = 100
"""Lines longer than this are hard to read, however wide the terminal."""
DEVICES_NAMED = 8
BEHIND_NAMED = 3
"""Directions of links that the verdict names."""
WORD_SHOWN = 24
"""Letters of a word that are shown."""
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

    def reading(self, given: Input, topology: str, *, simulated: bool = False) -> None:
        """What goes in, before anything has started, and what will: processes, or a machine that is `simulated`."""
        self._text = given.text
        size, source = show_size(len(given.text)), escape(given.source)
        # whoever gave files is told that they are not read whole; of the default nobody expects it
        whole = not (given.cut and given.files)
        self.line("input", f"{size} of text: {source}" if whole else f"the first {size} of {source}; --limit-mib says how much")
        how = "all in this process, in virtual time" if simulated else "each a process"
        self.line("machine", f"starting {escape(topology)}: a host and its devices, {how}")

    def started(self, started: Started) -> None:
        """The machine is up."""
        devices = started.devices if len(started.devices) <= DEVICES_NAMED else (*started.devices[:2], "...", started.devices[-1])
        slow = f"; {show_time(started.rate)} pass there in a second here" if started.rate != 1 else ""
        self.line("", f"{', '.join(devices)} ready after {started.seconds:.1f} s{slow}")

    def _counted(self, answers: Answers) -> None:
        common = ", ".join(f"{shorten(word)} {count:,}" for word, count in answers.most_common(self._text, 2, 3))
        examples = f": {escape(common)}, ..." if common else ""
        self.line("Python", f"counts {counted(answers.words, 'word')}, {len(answers.counts):,} different{examples}")

    def line(self, label: str, text: str) -> None:
        """One line under a label; a long one goes on under itself."""
        self._indented(Text(f"{label:<{LABEL_WIDTH}}", style="bold"), Text.from_markup(text))

    def _indented(self, head: Text, body: Text) -> None:
        for row in body.wrap(self._console, max(20, self._width - len(head))):
            row.rstrip()
            self._console.print(head + row, highlight=False, soft_wrap=True)
            head = Text(" " * len(head))

    def step(self, label: str, what: str, run: str, seconds: float, rest: str) -> None:
        """One measured step: what, in which run, how long in emulated time, and what there is to say."""
        self.line(label, f"{what:<11} {run:<9} {show_time(seconds):>8}  {rest}")

    def tell(self, event: Event) -> None:
        """Print one event."""
        if isinstance(event, Counted):
            self._counted(event.answers)
        elif isinstance(event, Built):
            self._built(event)
        elif isinstance(event, Asked):
            self._asked(event.question)
        elif isinstance(event, Ran):
            self._ran(event)
        elif isinstance(event, Moved):
            self._moved(event)
        elif isinstance(event, Checked):
            self._checked(event)
        elif isinstance(event, Found):
            times = counted(event.count, "time")
            self.line("", f"[dim]for one: {escape(event.word)} occurs {times}, first at byte {event.first_at:,}[/dim]")
        else:
            self.samples.append(event)

    def _asked(self, question: Question) -> None:
        self._console.print()
        self._indented(Text("? ", style="bold cyan"), Text(question.asked, style="bold cyan"))
        self._indented(Text("  "), Text(question.answer))
        self._console.print()

    def _built(self, event: Built) -> None:
        size_bytes = event.data.whole.size_bytes
        nodes, root = len(event.data.words), event.data.shares[0].root
        self.line("CPU", f"stores text, word lists, keys and a search tree of {counted(nodes, 'node')}: {show_size(size_bytes)}")
        self.line("", f"[dim]0x{root:x}, a node of the tree, is an address like any other[/dim]")

    def _ran(self, event: Ran) -> None:
        groups = int(sum(figure(job.counters, "fault_groups") for job in event.jobs.values()))
        fetched = PAGE_SIZE * sum(figure(job.counters, "pages_in") for job in event.jobs.values())
        cost = f"{counted(groups, 'fault group')} fetched {show_size(fetched)}" if groups else "no fault"
        earlier = self._demand_s.get(event.kernel)
        if event.run == DEMAND:
            self._demand_s[event.kernel] = event.seconds
        elif earlier and event.seconds:
            cost += f", [green]{earlier / event.seconds:.1f} times as fast[/green]"
        self.step("GPUs", KERNELS[event.kernel], event.run, event.seconds, cost)

    def _moved(self, event: Moved) -> None:
        speed = show_rate(event.crossed_bytes / event.seconds) if event.seconds > 0 else "no time"
        where = ("all input", "home") if event.to == "host" else ("each part", "to a GPU")
        self.step("migrate", *where, event.seconds, f"{show_size(event.crossed_bytes)} at {speed}")

    def _checked(self, event: Checked) -> None:
        right = f"[green]all {event.results:,} right[/green]"
        if event.wrong:
            right = f"[red]{event.wrong:,} of {event.results:,} wrong[/red]"
        home = f"{counted(event.pages_from_devices, 'page')} home, " if event.pages_from_devices else ""
        self.step("CPU", KERNELS[event.kernel], event.run, event.seconds, home + right)

    def finished(self, outcome: Outcome) -> None:
        """The tables, the picture and the verdict."""
        parts = (
            Fitted(profiler_table(Profile.from_json(outcome.report.get("profile", []))), key=-1),
            Group(Text("Where the pages live", style="italic"), picture(self.samples, outcome.devices, self._width)),
            links_table(outcome.report.get("links", []), self._width),
        )
        for part in parts:
            self._console.print(part)
            self._console.print()
        self._indented(Text(), Text.from_markup(verdict(outcome)))


def picture(samples: Sequence[Sampled], devices: Sequence[str], width: int) -> Text:
    """The pages by owner, at each moment."""
    columns = columns_of(samples, devices)
    column_width = max(PICTURE_COLUMN_MIN, width // max(len(columns), 1) - 1)
    labelled = all(len(sample.label) <= column_width for sample in columns)
    holders = (sum(map(bool, sample.pages.values())) for sample in folded(columns))
    rows = max(PICTURE_ROWS, *holders, 0)  # one for everybody who holds a page
    drawn = terminal_picture(columns, rows, min(column_width, PICTURE_COLUMN_MAX), labelled)
    if not labelled:
        drawn.append("\n" + "  ".join(f"{i} {sample.label}" for i, sample in enumerate(columns, 1)), style="dim")
    return drawn


def columns_of(samples: Sequence[Sampled], devices: Sequence[str]) -> list[Sample]:
    """The samples as a picture has them, for a terminal or (`residency.svg_picture`) a file."""
    return [Sample(sample.emulated_s, pages_by_owner(sample, devices), sample.moment) for sample in samples]


def pages_by_owner(sample: Sampled, devices: Sequence[str]) -> dict[str, int]:
    """How many pages each owner holds: host memories, then devices as the topology has them, then untouched ones."""
    pages: Counter[str] = Counter()
    for i, owner in enumerate(sample.residency.owners):
        pages[owner] += int((sample.residency.pages == i).sum())
    pages[ABSENT] += int((sample.residency.pages == -1).sum())
    order = [*sorted(pages.keys() - {ABSENT, *devices}), *(device for device in devices if device in pages), ABSENT]
    return {owner: pages[owner] for owner in order}


def verdict(outcome: Outcome) -> str:
    """The last line."""
    checked = sum(fact["results"] for fact in outcome.facts if fact["step"] == "check")
    end = f"{outcome.seconds:.1f} s"
    behind = [link for link in outcome.report.get("links", []) if link["bytes_moved"] and not link["kept_up"]]
    note = "The emulation kept up with the links."
    if behind:
        named = ", ".join(f"{link['source']} > {link['target']}" for link in behind[:BEHIND_NAMED])
        more = f" and {len(behind) - BEHIND_NAMED} more" if len(behind) > BEHIND_NAMED else ""
        note = f"The emulation fell behind on {escape(named)}{more}: transfers took longer than real ones would."
    if outcome.correct:
        return f"[bold green]RIGHT[/bold green] All {checked:,} results are what plain Python computes, in {end}. {note}"
    return f"[bold red]WRONG[/bold red] {escape('; '.join(outcome.mistakes))} ({end}). {note}"


def figure(counters: Mapping[str, Any], name: str) -> float:
    """A job's counter, 0 when the device does not count it."""
    value = counters.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0


def shorten(word: str) -> str:
    """A word as a line can hold it."""
    return word if len(word) <= WORD_SHOWN else f"{word[:WORD_SHOWN]}... ({len(word):,} letters)"
