"""Trace files: read whole or refused with file, line, cause and mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from hmmnet.play.script import FILE_BYTES_MAX, ScriptError, parse_scripts, read_scripts

GOOD = """\
# a remark before the first script
=== one
# what it is about
open d0 0

  mmap A 4
--- recorded
2: open d0 0 => ok
4: mmap A 4 => ok
KERNEL WARNING

=== two
exit
--- recorded
1: exit => status 0
END killed 9
"""


def test_a_file_of_two() -> None:
    """Line numbers count from the script's first line; remarks, blank lines and leading spaces do not matter; trailers are kept."""
    one, two = parse_scripts(GOOD, "good.traces")
    assert (one.name, one.line, two.name, two.line) == ("one", 2, "two", 12)
    assert [(o.number, o.file_line, o.text) for o in one.operations] == [(2, 4, "open d0 0"), (4, 6, "mmap A 4")]
    assert [(r.number, r.operation, r.result) for r in one.recorded] == [(2, "open d0 0", "ok"), (4, "mmap A 4", "ok")]
    assert two.recorded[-1].number == 0
    assert two.recorded[-1].result == "END killed 9"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "no script"),
        ("open d0 0\n", 1, "before any script"),
        ("=== \n--- recorded\n", 1, "no name"),
        ("=== a\nopen d0 0\n", 1, "no recorded output"),
        ("=== a\nopen d0 0\n--- recorded\nnonsense\n", 4, "no recorded line"),
        ("=== a\nopen d0 0\n--- recorded\n7: open d0 0 => ok\n", 4, "holds no operation"),
        ("=== a\nopen d0 0\n--- recorded\n1: open d0 1 => ok\n", 4, "line 1 of the script is 'open d0 0'"),
        ("=== a\nopen d0 0\n--- recorded\n1: open d0 0 => ok\n1: open d0 0 => ok\n", 5, "ascend"),
        ("=== a\n--- recorded\n=== a\n--- recorded\n", 3, "stands at line 1 already"),
    ],
)
def test_mistakes_are_placed(text: str, line: int, words: str) -> None:
    """Each complaint says which line and why."""
    with pytest.raises(ScriptError) as caught:
        parse_scripts(text, "bad.traces")
    assert caught.value.line == line
    assert str(caught.value).startswith(f"bad.traces:{line}: ")
    assert words in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    """A missing, binary or far too large file is refused by name."""
    with pytest.raises(ScriptError, match="cannot be read"):
        read_scripts(tmp_path / "missing")
    binary = tmp_path / "binary"
    binary.write_bytes(b"=== a\n\xff\xfe")
    with pytest.raises(ScriptError, match="UTF-8"):
        read_scripts(binary)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(FILE_BYTES_MAX + 1)
    with pytest.raises(ScriptError, match="limit 64 MiB"):
        read_scripts(large)


def test_every_recording_is_understood() -> None:
    """The recordings that ship with the tests parse whole."""
    folder = Path(__file__).parent.parent / "conformance" / "recordings"
    scripts = [script for path in sorted(folder.glob("*.traces")) for script in read_scripts(path)]
    assert len(scripts) == 1064
    assert len([s for s in scripts if s.name.startswith("h")]) == 59
