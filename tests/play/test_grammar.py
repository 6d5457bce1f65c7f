"""Lines of scripts: parsed by usage, unsupported ones told from mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hmmnet.play.grammar import SYNTAX_OPERATIONS, Unsupported, Usage, parse_steps
from hmmnet.play.operations import OPERATIONS, usages
from hmmnet.play.player import prepare
from hmmnet.play.script import Operation, Script, ScriptError, read_scripts


def script(*lines: str) -> Script:
    operations = tuple(Operation(i, i + 1, tuple(line.split())) for i, line in enumerate(lines, 1))
    return Script("s", "s.traces", 1, operations, ())


def test_arguments() -> None:
    """Numbers in decimal and hex, defaults for what may be left out."""
    steps = parse_steps(script("open d0 1", "mmap A 4", "mmap B 0x10 none", "dwrite d0 A 1 2 0xff", "dread d0 B 3"), usages())
    assert [s.arguments for s in steps] == [
        ("d0", 1),
        ("A", 4, "rw", None, None, False, False, False, False),
        ("B", 16, "none", None, None, False, False, False, False),
        ("d0", "A", 1, 2, 255),
        ("d0", "B", 3, 1),
    ]


def test_what_is_not_built_is_counted_not_refused() -> None:
    """An operation of the syntax without a function; its names count as given."""
    built = {name: usage for name, usage in usages().items() if name not in {"memfd", "uffd"}}
    steps = parse_steps(script("memfd F 3", "mmap S 3 r thp file=F", "uffd S 0 3", "sum S 0 3"), built)
    assert [s.arguments for s in (steps[0], steps[2])] == [Unsupported("memfd"), Unsupported("uffd")]
    assert steps[3].arguments == ("S", 0, 3)


def test_options_with_a_value() -> None:
    """In any order; a file must have been made, and each may come once."""
    steps = parse_steps(script("memfd f 3", "mmap A 4 shared off=0x2 file=f", "mmap B 1 r file=f populate"), usages())
    assert [s.arguments for s in steps[1:]] == [
        ("A", 4, "rw", "f", 2, False, False, True, False),
        ("B", 1, "r", "f", None, False, True, False, False),
    ]
    with pytest.raises(ScriptError, match="no file is called 'g'"):
        parse_steps(script("memfd f 3", "mmap A 4 file=g"), usages())
    with pytest.raises(ScriptError, match="off was given before"):
        parse_steps(script("mmap A 4 off=1 off=2"), usages())


def test_words_that_stand_for_themselves() -> None:
    """In any order behind the required arguments, and with or without what may be left out."""
    lines = ("mmap A 4 populate", "mmap A 4 r populate", "mmap A 4", "pin A 0 4 fast w", "pin A 0 4 w", "mremap A 0 1 2 B dontunmap")
    steps = parse_steps(script(*lines), usages())
    assert [s.arguments for s in steps] == [
        ("A", 4, "rw", None, None, False, True, False, False),
        ("A", 4, "r", None, None, False, True, False, False),
        ("A", 4, "rw", None, None, False, False, False, False),
        ("A", 0, 4, True, True),
        ("A", 0, 4, True, False),
        ("A", 0, 1, 2, "B", True),
    ]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["mapp A 4"], "unknown operation 'mapp'; did you mean \"mmap\"?"),
        (["mmap A"], "argument n is missing; usage: mmap NAME n [PROT] [file=F] [off=n] [hugetlb] [populate] [shared] [thp]"),
        (["mmap A four"], "'four' is no number"),
        (["mmap A -1"], "negative"),
        (["mmap A 16385"], "too many pages"),
        (["mmap A 4 wr"], "'wr' is no protection"),
        (["mmap A 4 rw rw"], "one word too many"),
        (["mmap A 4", "write A 0 4096 1"], "offset inside a page"),
        (["mmap A 4", "write A 0 0 256"], "one byte"),
        (["mmap A 4", "read B 0 0"], "no region is called 'B'"),
        (["mmap A 4", "snap d0 A 0"], "no device is called 'd0'"),
        (["fork", "exit", "exit"], "no child to exit"),
        (["mmap A 4", "madvise A 0 1 DONTNEDD"], 'did you mean "DONTNEED"'),
    ],
)
def test_mistakes(lines: list[str], words: str) -> None:
    """File, line, cause and mend."""
    with pytest.raises(ScriptError) as caught:
        parse_steps(script(*lines), usages())
    assert words in str(caught.value)
    assert caught.value.line == len(lines) + 1


def test_usages_print_as_the_syntax_has_them() -> None:
    assert str(Usage.of("dwrite D R p n val")) == "dwrite D R p n val"
    assert set(OPERATIONS) <= set(SYNTAX_OPERATIONS)


def test_every_recording_is_parsed() -> None:
    """No line of the recordings is a mistake to the grammar."""
    folder = Path(__file__).parent.parent / "conformance" / "recordings"
    for path in sorted(folder.glob("*.traces")):
        for one in read_scripts(path):
            assert len(prepare(one)) == len(one.operations)
