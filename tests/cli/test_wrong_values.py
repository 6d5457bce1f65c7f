"""Values that cannot be used: one line that names them, before the work where that is possible."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import hmmnet
from hmmnet.cli import exit_code
from hmmnet.cli.outputs import writable, write
from hmmnet.demo.screen import shorten
from hmmnet.errors import HmmnetError
from hmmnet.topology.files import exists, is_file
from tests import disks

WORKLOAD = """
async def alone():
    return {}

async def strict(machine, n: int = 1):
    raise ValueError("the user's own mistake")

async def asks(machine):
    process = await machine.create_process()
    await process.launch("vector_ad", "gpu0")
"""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["vector_add", "n=abc"], "vector_add: n is 'abc'; a whole number is wanted"),
        (["vector_add", "n=1.5"], "vector_add: n is 1.5; a whole number is wanted"),
        (["vector_add", "n=true"], "vector_add: n is True; a whole number is wanted"),
        (["vector_add", "n=-5"], "vector_add: "),
        (["vector_add", "devices=gpu7", "n=8"], "no device is called gpu7; this machine has gpu0, gpu1"),
        (["FILE:alone"], "takes no machine: a workload is written as async def alone(machine, ...)"),
    ],
)
def test_workloads(given: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Exit code 2 and one line behind the progress lines."""
    file = tmp_path / "mine.py"
    file.write_text(WORKLOAD)
    code = exit_code(["run", *(word.replace("FILE", str(file)) for word in given), "--rate", "1"])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.splitlines()[-1].startswith("hmmnet run: ")
    assert says in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err


def test_a_users_own_mistake_is_shown_where_it_is(tmp_path: Path) -> None:
    """A workload of the user's that raises is not reduced to a sentence."""
    file = tmp_path / "own.py"
    file.write_text(WORKLOAD)
    with pytest.raises((ValueError, ExceptionGroup), match=r"mistake|sub-exception"):
        exit_code(["run", f"{file}:strict", "--rate", "1"])


def test_an_answer_in_a_users_workload_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line: file and line of the call, and what the machine said."""
    file = tmp_path / "own.py"
    file.write_text(WORKLOAD)
    line = WORKLOAD.split("vector_ad", maxsplit=1)[0].count("\n") + 1
    assert exit_code(["run", f"{file}:asks", "--world", "sim"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f'hmmnet run: {file}:{line}: launch: ENOENT: no kernel is called "vector_ad"; ')


def test_a_picture_that_cannot_be_written_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the demo begins; what can be written is left as it was."""
    assert exit_code(["demo", "--limit-mib", "1", "--svg", "/nowhere/x.svg"]) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) <= 2
    assert captured.err == "hmmnet demo: /nowhere/x.svg: cannot be written: No such file or directory; name another file\n"
    new, old = tmp_path / "new.svg", tmp_path / "old.svg"
    old.write_text("kept")
    for path in (new, old):
        writable(path)
    assert not new.exists()
    assert old.read_text() == "kept"


def test_a_file_that_could_not_be_written_is_not_begun(tmp_path: Path) -> None:
    """What was there before is the user's, whatever became of it; nothing else is left."""
    new, old = tmp_path / "new.svg", tmp_path / "old.svg"
    old.write_text("kept")
    for file in (new, old):
        with disks.full(), pytest.raises(HmmnetError, match=r"cannot be written: .*; name another file"):
            write(file, "text" * 10_000)
    assert [file.name for file in tmp_path.iterdir()] == ["old.svg"]
    assert old.read_text() == "kept"


def test_a_link_that_waits_for_a_file_is_not_followed(tmp_path: Path) -> None:
    """In a folder of everybody's somebody may guess the name of the file that replaces another: it has none that can be guessed."""
    theirs = tmp_path / "theirs"
    theirs.write_text("kept")
    (tmp_path / f".hmmnet-{os.getpid()}").symlink_to(theirs)
    write(tmp_path / "mine", "text")
    assert (theirs.read_text(), (tmp_path / "mine").read_text(), (tmp_path / "mine").is_symlink()) == ("kept", "text", False)


def test_where_nobody_may_look_a_file_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads it says why not; where no file can be there is none."""
    assert not exists(tmp_path / "none")
    assert not is_file(tmp_path)
    assert not is_file(tmp_path / ("x" * 5000))
    assert not is_file(tmp_path / "a\0b")

    def refused(*_: object, **__: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "stat", refused)
    assert exists(tmp_path / "none")
    assert is_file(tmp_path / "none")


def test_a_file_is_written_whole_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rights stay, a link stays one, what is no file is written to; and where no other file can be beside it, it is written anyway."""
    file, link = tmp_path / "real", tmp_path / "link"
    file.write_text("before")
    file.chmod(0o640)
    link.symlink_to(file)
    write(link, "text")
    assert (file.read_text(), link.is_symlink(), file.stat().st_mode & 0o777) == ("text", True, 0o640)
    write(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()

    def busy(*_: object) -> Path:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "replace", busy)
    write(file, "again")
    assert file.read_text() == "again"
    assert {one.name for one in tmp_path.iterdir()} == {"real", "link"}


def test_all_mistakes_of_a_topology_are_told_by_every_way_to_start_one(tmp_path: Path) -> None:
    """An unknown model is one of them."""
    file = tmp_path / "two.toml"
    file.write_text("""
[[memory]]
name = "node0"
size = "1 GiB"
[[device]]
name = "gpu0"
model = "gpuu"
memory = "1 GiB"
[[link]]
a = "node0"
b = "gpu0"
bandwidth = "fast"
""")
    with pytest.raises(HmmnetError) as told:
        hmmnet.launch(file)
    assert 'did you mean "gpu"' in str(told.value)
    assert "bandwidth" in str(told.value)
    assert exit_code(["up", str(file)]) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["replay", "LONG"], 'LONG" is no seed, and there is no such file'),
        (["shrink", "LONG/x", "-o", "x.json"], 'LONG/x" is no seed, and there is no such file'),
        (["shrink", "1", "-o", "LONG"], "LONG: cannot be written: File name too long"),
        (["replay", "1" * 5000], "a seed has at most 100 digits, not 5000"),
        (["topo", "show", "LONG"], "LONG: no preset and no file has this name"),
        (["topo", "show", "LONG.toml"], "LONG.toml: cannot be read: File name too long"),
        (["up", "LONG/x"], "LONG/x: cannot be read: File name too long"),
        (["run", "LONG.py:work"], "LONG.py: there is no such file"),
    ],
)
def test_a_text_too_long_for_a_name(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Is no file's, and no crash of ours."""
    long = "l" * 5000
    assert exit_code([word.replace("LONG", long) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says.replace("LONG", long) in captured.err


def test_a_long_word_is_shown_in_short() -> None:
    """With its length."""
    assert shorten("a" * 3_000_000) == "a" * 24 + "... (3,000,000 letters)"
    assert shorten("word") == "word"
