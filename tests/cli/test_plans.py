"""``--faults FILE``: mistakes before anything starts, faults while the machine runs, and how often they happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hmmnet.cli import exit_code

LATE = '[[fault]]\nkind = "delay"\nlatency = "10 us"\n\n[[fault]]\nkind = "alloc.host"\nnth = 1000000\n'
COMMANDS = [["run", "vector_add"], ["demo"], ["play", "none.trace"], ["selftest"], ["up", "--name", "planned"]]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "plan.toml"


@pytest.mark.parametrize("command", [pytest.param(words, id=words[0]) for words in COMMANDS])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        ('[[fault]]\nkind = "los"\n', 'did you mean "loss"?'),
        ('[[fault]]\nkind = "unplug"\non = "gpu0"\n', 'the fault "unplug" cannot be done in the real world'),
        ('[[fault]]\nkind = "partition"\non = "nothing7<->host"\n', 'no device is called "nothing7"'),
        ('[[fault]]\nkind = "process.exit"\npoint = "device.job_end"\n', "where the host cannot act; give a point of the host"),
        ('[[fault]]\nkind = "host.crash"\n', 'the fault "host.crash" cannot be done in the real world'),
        ('[[fault]]\nkind = "crash"\non = "nothing7"\n', 'no device is called "nothing7"'),
        ('[[fault]]\nkind = "link.down"\non = "nowhere"\n', 'no link is called "nowhere"'),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    command: list[str], text: str | None, says: str, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, the file and the mistake on stderr, and no word of a machine that starts."""
    if text is not None:
        plan.write_text(text)
    assert exit_code([*command, "--faults", str(plan)]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert str(plan) in captured.err
    assert "starting" not in captured.out + captured.err


VAIN = '# nobody\n[[fault]]\nkind = "process.exit"\nprocess = 4242\n'


def test_what_is_in_vain_from_the_start_is_told_with_its_line(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and the line of the plan on stderr."""
    plan.write_text(VAIN)
    assert exit_code(["run", "vector_add", "n=4096", "--world", "sim", "--faults", str(plan)]) == 2
    assert f"{plan}:2: fault 1: there is no process 4242; those that run are " in capsys.readouterr().err


def test_a_workload_under_faults_in_virtual_time(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The results are right, and the last line counts what happened and names what did not; the same seed counts the same."""
    plan.write_text(LATE)
    words = ["run", "vector_add", "n=4096", "--world", "sim", "--faults", str(plan)]
    assert exit_code(words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert exit_code([*words, "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["faults"]
    assert counted["delay"] > 10
    assert counted["alloc.host"] == 0
    assert last == f"faults: delay {counted['delay']}, alloc.host 0"


def test_a_failing_allocation_shows_in_a_selftest(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The case fails by the fault, and the line says that it happened."""
    plan.write_text('[[fault]]\nkind = "alloc.host"\n')
    assert exit_code(["selftest", "anon_read", "--kind", "private", "--world", "sim", "--faults", str(plan)]) == 1
    printed = capsys.readouterr().out
    assert "ENOMEM" in printed
    assert printed.splitlines()[-1].startswith("faults: alloc.host ")


def test_one_failing_allocation_is_enough(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who meets an injected ENOMEM does not try again, as it would where memory is short: the case fails by that one fault."""
    plan.write_text('[[fault]]\nkind = "alloc.host"\ntimes = 1\n')
    assert exit_code(["selftest", "anon_read", "--kind", "private", "--world", "sim", "--faults", str(plan)]) == 1
    printed = capsys.readouterr().out
    assert "a fault was injected at host.alloc.frame" in printed
    assert printed.splitlines()[-1] == "faults: alloc.host 1"


@pytest.mark.parametrize("words", [["run", "vector_add", "n=4096"], ["demo", "--input", "TEXT"]], ids=["run", "demo"])
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["told", "json"])
def test_faults_are_counted_when_the_work_fails(
    words: list[str], form: list[str], plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error, and before it how often each fault has happened, on stderr."""
    plan.write_text('[[fault]]\nkind = "alloc.host"\ntimes = 1\n\n[[fault]]\nkind = "alloc.home"\n')
    text = tmp_path / "text"
    text.write_text("to be or not to be " * 50)
    given = [str(text) if word == "TEXT" else word for word in words]
    assert exit_code([*given, "--world", "sim", "--faults", str(plan), *form]) == 1
    told, error = capsys.readouterr().err.splitlines()[-2:]
    assert told == "faults: alloc.host 1, alloc.home 0"
    assert "ENOMEM" in error


def test_the_demo_under_faults_in_virtual_time(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A delay changes no result."""
    plan.write_text(LATE)
    text = tmp_path / "text"
    text.write_text("to be or not to be " * 50)
    assert exit_code(["demo", "--input", str(text), "--world", "sim", "--faults", str(plan), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correct"]
    assert found["faults"]["delay"] > 10
