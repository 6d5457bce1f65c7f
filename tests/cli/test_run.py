"""``hmmnet run``: which function is meant, which arguments it gets, and its report."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

import hmmnet
from hmmnet.blocking import only_error
from hmmnet.cli import exit_code
from hmmnet.cli.run import check_arguments, figure_row, find, parse_arguments, plain, plain_errors, said_of, show
from hmmnet.errors import HmmnetError, PeerGone, RemoteError

WORKLOAD = """
from beside import FACTOR

async def work(machine, n=1, *, word="x", needed):
    return {"n": FACTOR * n}

def not_async(machine):
    return {}

async def full(machine):
    raise OSError(28, "No space left on device")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("FACTOR = 2\n")
    path = tmp_path / "mine.py"
    path.write_text(WORKLOAD)
    return path


async def test_a_function_of_a_file_runs_with_its_folder(file: Path) -> None:
    """Imports from beside it work, as for a script."""
    function = find(f"{file}:work")
    assert await function(None, n=3, needed=1) == {"n": 6}


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("{file}:wrok", 'no function "wrok"; did you mean "work"?'),
        ("{file}", "which function"),
        ("{file}:not_async", "async def not_async"),
        ("{file}x.py:work", "no such file"),
    ],
)
def test_what_cannot_be_found_is_said(file: Path, place: str, says: str) -> None:
    """With the mend."""
    with pytest.raises(HmmnetError) as caught:
        find(place.format(file=file))
    assert says in str(caught.value)


def test_a_file_with_a_mistake_names_its_line(tmp_path: Path) -> None:
    """File and line, not a traceback."""
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nasync def work(machine:\n")
    with pytest.raises(HmmnetError, match=r"broken\.py:2: "):
        find(f"{path}:work")


def test_arguments_are_json_where_they_are_json() -> None:
    """Numbers, lists, truth; everything else is text."""
    given = parse_arguments(["n=1000", "x=1.5", "names=[1, 2]", "yes=true", "text=hello=world", "empty="])
    assert given == {"n": 1000, "x": 1.5, "names": [1, 2], "yes": True, "text": "hello=world", "empty": ""}


@pytest.mark.parametrize("pair", ["n", "=3", "a b=3", "1=2"])
def test_what_is_no_pair_is_refused(pair: str) -> None:
    """With an example."""
    with pytest.raises(HmmnetError, match="NAME=VALUE"):
        parse_arguments([pair])


def test_arguments_are_checked_before_a_machine_starts(file: Path) -> None:
    """Unknown ones with a suggestion, missing ones by name."""
    function = find(f"{file}:work")
    check_arguments("work", function, {"n": 1, "needed": 2})
    with pytest.raises(HmmnetError, match='did you mean "word"'):
        check_arguments("work", function, {"wrd": 1, "needed": 2})
    with pytest.raises(HmmnetError, match="needs needed="):
        check_arguments("work", function, {})


def test_a_built_in_workload_takes_no_negative_number() -> None:
    """Said before a machine starts; what a negative number means to a workload of one's own is its own business."""
    with pytest.raises(HmmnetError, match="vector_add: n is -1; at least 0 is wanted"):
        check_arguments("vector_add", find("vector_add"), {"n": -1})

    async def work(machine: object, n: int) -> None: ...

    check_arguments("work", work, {"n": -1})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["word_count", "input=/nowhere/x"], "word_count: /nowhere/x: No such file or directory"),
        (["word_count", "input=/proc/self/mem"], "word_count: /proc/self/mem: Input/output error"),
        (["vector_add", f"n={1 << 44}"], "vector_add: Unable to allocate"),
        (["{file}:full"], "{file}:11: [Errno 28] No space left on device"),
    ],
)
def test_what_a_workload_cannot_have_is_one_line(file: Path, given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Files, memory, room: no traceback, and nothing is said of standard output, which has nothing to do with it."""
    assert exit_code(["run", *(word.format(file=file) for word in given), "--world", "sim"]) == (1 if "{file}" in given[0] else 2)
    assert f"hmmnet run: {says.format(file=file)}" in capsys.readouterr().err


def test_who_is_lost_is_not_said_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that runs on without a device is used as it is."""
    with tempfile.TemporaryDirectory(prefix="hn-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HMMNET_DIR", folder)
        with hmmnet.launch("two-gpus", rate=1.0, name="worn") as machine:
            machine.kill_device("gpu0")
            assert exit_code(["run", "reduction", "n=1000", "--on", "worn"]) == 0
    told = capsys.readouterr()
    assert "running reduction on gpu0 (lost), gpu1\n" in told.err
    assert "every result is correct" in told.out


def test_seconds_and_bytes_are_shown_in_units_that_people_read() -> None:
    """Where every device has a figure; the name loses the unit."""
    assert figure_row("fault_group_s", [0.000123, 2.5]) == ("fault_group", "123 us", "2.5 s")
    assert figure_row("remote_read_bytes", [4096]) == ("remote_read", "4 KiB")
    assert figure_row("faults", [1234, None]) == ("faults", "1,234", "")
    assert figure_row("emulated_s", [0.5, None]) == ("emulated_s", "0.5", "")


def test_reports_are_shown_and_plain(capsys: pytest.CaptureFixture[str]) -> None:
    """Facts, a table by device, the verdict; numpy values as numbers in JSON."""
    report = {
        "workload": "reduction",
        "correct": False,
        "mistakes": ["the sum is [7] instead of 8"],
        "sum": 7,
        "devices": {"gpu0": {"fault_groups": 12345, "seconds": 0.123456}, "gpu1": {"seconds": 1.0}},
    }
    links = [
        {"source": "gpu0", "target": "node0", "bytes_moved": 4096, "kept_up": True}
        | {f"{speed}_bytes_per_s": 1e9 for speed in ("capacity", "asked", "reached")}
    ]
    show(report, links, 0.25)
    out = capsys.readouterr().out
    for text in ("reduction", "250 ms", "12,345", "0.1235", "gpu0 > node0", "kept up", "results are wrong", "the sum is [7] instead of 8"):
        assert text in out
    assert (
        json.dumps({"a": np.int64(3), "b": np.arange(2), "c": b"\x01", "d": Path("x")}, default=plain)
        == '{"a": 3, "b": [0, 1], "c": "01", "d": "x"}'
    )


def test_a_machine_that_goes_away_meanwhile_is_named() -> None:
    """Who runs something on a machine of somebody else's is told which is gone; of one's own there is no other."""
    with pytest.raises(HmmnetError, match=r'^machine "shared" is gone: host said goodbye$'), said_of("shared"):
        raise PeerGone("host said goodbye")
    with pytest.raises(PeerGone), said_of(None):
        raise PeerGone("host said goodbye")
    with pytest.raises(PeerGone, match="gpu0 killed"), said_of("shared"):
        raise PeerGone("gpu0 killed") from RemoteError("host: Call: PeerGone: gpu0 killed")
    with pytest.raises(PeerGone, match=r"^gpu0 killed$"), said_of("shared"), only_error():  # as it leaves a machine's nurseries
        lost = PeerGone("gpu0 killed")
        lost.__cause__ = RemoteError("host: Call: PeerGone: gpu0 killed")
        raise ExceptionGroup("a nursery's", [lost])


def goodbye() -> None:
    """A workload of the user's whose machine goes away."""
    raise PeerGone("host said goodbye")


def test_a_machine_that_goes_away_in_a_workload_of_the_users_is_named() -> None:
    """With the line of the workload that was waiting."""
    said = r'^machine "shared" is gone: .*test_run\.py:\d+: host said goodbye$'
    with pytest.raises(HmmnetError, match=said), said_of("shared"), plain_errors(goodbye):
        goodbye()


def test_a_workload_whose_reader_goes_away_has_not_failed() -> None:
    """As with any command in front of ``head``."""
    with pytest.raises(BrokenPipeError), plain_errors(goodbye):
        raise BrokenPipeError(32, "Broken pipe")
