"""What a person sees: both results, cut to what differs."""

from __future__ import annotations

import io

from rich.console import Console

from hmmnet.play.compare import Tally, compare
from hmmnet.play.report import contrast, show_differences, show_summary
from hmmnet.play.script import parse_scripts


def printed(tally: Tally, width: int = 100) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    show_differences(console, tally.outcomes, everything=False)
    show_summary(console, tally)
    return out.getvalue()


def tally_of(got: dict[int, str], unsupported: tuple[str, ...] = ()) -> Tally:
    text = "=== h07\nmmap A 2\nread A 0 0\nsum A 0 2\n--- recorded\n1: mmap A 2 => ok\n2: read A 0 0 => ok 00\n3: sum A 0 2 => [z u01]\n"
    script = parse_scripts(text, "some/hand.traces")[0]
    return Tally([compare(script, got, unsupported, "unsupported operation: sum" if unsupported else "")])


def test_a_difference_names_script_line_and_both_results() -> None:
    text = printed(tally_of({1: "ok", 2: "SEGV", 3: "[z u01]"}))
    for words in (
        "h07",
        "some/hand.traces:1",
        "mmap A 2 => ok",
        "2: read A 0 0",
        "recorded  ok 00",
        "got       SEGV",
        "0 of 1 scripts identical",
    ):
        assert words in text


def test_identical() -> None:
    text = printed(tally_of({1: "ok", 2: "ok 00", 3: "[z u01]"}))
    assert "identical: the script answers as the recorded" in text


def test_stopped_scripts_are_counted_apart() -> None:
    text = printed(tally_of({1: "ok", 2: "ok 00"}, ("sum",)))
    assert "not built yet, equal up to there" in text
    assert "sum 1" in text
    assert "h07" not in text


def test_long_lists_are_cut_to_the_tokens_that_differ() -> None:
    """By position, so that 130 pages stay readable."""
    one = ["z"] * 130
    two = [*one]
    two[64] = "u02"
    recorded, got = contrast(f"ok cpages=130 [{' '.join(two)}]", f"ok cpages=130 [{' '.join(one)}]")
    assert recorded == "ok cpages=130 [#64:u02 of 130 tokens]"
    assert got == "ok cpages=130 [#64:z of 130 tokens]"
    assert contrast("ok", "ERR ENOENT") == ("ok", "ERR ENOENT")
