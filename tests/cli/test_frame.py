"""The command line's frame: commands that exist, errors in one line, exit codes, and the time until the first line."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hmmnet
from hmmnet import cli
from hmmnet.cli import COMMANDS, command_names, did_you_mean, exit_code


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = exit_code(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for: exit code 0; shown because nothing was asked for: 2."""
    code, out, _ = asked(capsys, "--help")
    assert code == 0
    assert all(name in out for name in command_names())
    assert asked(capsys)[0] == 2


@pytest.mark.parametrize(
    ("words", "inner"), [(["bounce", "gpu0", "gpu1"], "fault bounce"), (["ls", "--jsn"], "fault ls"), (["bonce"], "fault")]
)
def test_the_help_that_is_named_is_of_the_command_that_was_meant(words: list[str], inner: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a group the command inside, where there is one."""
    code, _, err = asked(capsys, "fault", *words)
    assert code == 2
    assert f'"hmmnet {inner} --help" shows how it is used' in err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each module is there, and its first line says what it does."""
    code, out, err = asked(capsys, name, "--help")
    assert code == 0
    assert err == ""
    assert f"Usage: hmmnet {name}" in out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["upp"], 'no command "upp"; did you mean "up"?'),
        (["--verison"], 'no option "--verison"'),
        (["up", "--nmae", "x"], 'no option "--nmae"; did you mean "--name"?'),
        (["up", "--transport", "ipx"], 'did you mean "ipc"?'),
        (["logs", "--level", "warn"], 'did you mean "warning"?'),
        (["run"], "WORKLOAD"),
        (["up", "--seed"], "'--seed' requires an argument"),
        (["up", "--seed", "x"], "--seed: "),
        (["campaign", "--jobs", "0"], "--jobs: "),
        (["run", "vector_add", "--world", "rael"], 'there is no "rael"; did you mean "real"?; there are: real, sim'),
        (["topo", "sho"], 'there is no command "sho"; did you mean "show"?; there are: ls, show, check, draw'),
        (["help", "upp"], 'no command "upp"; did you mean "up"?'),
        (["selftest", "anon_raed"], 'did you mean "anon_read"?'),
        (["bench", "dam"], 'no benchmark is called "dam"; did you mean "dma"?'),
        (["bugs", "owner-not-compare"], 'did you mean "owner-not-compared"?'),
        (["campaign", "--seeds", "3:1"], "names no seeds"),
        (["campaign", "--faults", "los"], 'did you mean "loss"? There are all, none'),
        (["replay", "nowhere.json"], "is no seed, and there is no such file"),
        (["sweep", "tuor"], 'nor such a file; did you mean "tour"? There are tour'),
        (["sweep", "--fault", "crsh"], 'no fault of a sweep is called "crsh"; did you mean "crash"?'),
        (["sweep", "--only", "migrat.mid_copy"], 'begins with "migrat.mid_copy"; did you mean "migrate.mid_copy"?'),
        (["sweep", "--only", "migrate.mid_copy", "--fault", "loss"], '"loss" cannot happen; what can is delay'),
        (["up", "--rate", "fast"], "write auto, or a number"),
        (["up", "--rate", "0"], "out of reach"),
        (["up", "--rate", "nan"], "out of reach"),
        (["up", "--personality", "v26"], "there are today, v25"),
        (["run", "vector_add", "--rate", "x"], "write auto, or a number"),
        (["run", "vector_add", "--on", "x", "--topology", "y"], "exclude each other"),
        (["run", "vector_add", "--world", "sim", "--on", "x"], "goes with neither"),
        (["down", "--all", "x", "y"], "exclude each other"),
        (["sweep", "--merge", "/nowhere/x"], "/nowhere/x: cannot be read: No such file or directory"),
    ],
)
def test_wrong_use_is_one_line_with_a_mend(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that names the place."""
    code, out, err = asked(capsys, *given)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("hmmnet")
    assert says in err


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["up", "--name", "a/b"], 2, "letters, digits"),
        (["up", "two-gpu"], 2, 'did you mean "two-gpus"'),
        (["run", "vectr_add"], 2, 'did you mean "vector_add"?'),
        (["run", "vector_add", "m=3"], 2, 'no argument "m"'),
        (["run", "vector_add", "--topology", "two-gpu"], 2, 'did you mean "two-gpus"'),
        (["run", "vector_add", "=3"], 2, "NAME=VALUE"),
        (["run", "nowhere.py:main"], 2, "no such file"),
        (["run", "vector_add", "--on", "nobody-here"], 1, 'no machine "nobody-here" runs'),
        (["down", "nobody-here"], 1, 'no machine "nobody-here" runs'),
        (["down", "nobody-here", "nor-here"], 1, 'no machine "nobody-here" or "nor-here" runs'),
        (["logs", "nobody-here"], 1, 'there is no machine "nobody-here"; '),
        (["fault", "add", "crsh", "gpu0"], 2, 'no fault is called "crsh"; did you mean "crash"?'),
        (["fault", "add", "point.delay", "gpu0", "point=nosuch"], 2, "`hmmnet fault points` lists them"),
        (["fault", "add", "point.delay", "gpu0", "point=migrate.mid_cpy"], 2, 'did you mean "migrate.mid_copy"?'),
        (["fault", "rm", "1", "all"], 2, '"all" alone'),
    ],
)
def test_what_cannot_be_done_is_one_line_with_a_mend(given: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 where it was asked wrongly, 1 where a machine does not run."""
    ended, out, err = asked(capsys, *given)
    assert (ended, out) == (code, "")
    assert err.count("\n") == 1
    assert err.startswith(f"hmmnet {given[0]}: ")
    assert says in err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    """As installed."""
    from importlib.metadata import version

    assert asked(capsys, "--version") == (0, f"hmmnet {version('hmmnet')}\n", "")
    assert asked(capsys, "-V") == asked(capsys, "--version")
    assert hmmnet.__version__ == version("hmmnet")


def test_help_before_a_command_is_help_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a command in a group, and by the short option, in each of them."""
    told = asked(capsys, "help", "fault", "add")
    assert told[0] == 0
    assert "Usage: hmmnet fault add [OPTIONS]" in told[1]
    assert asked(capsys, "fault", "add", "-h") == asked(capsys, "fault", "add", "--help") == told


def test_usage_lines_are_not_nested(capsys: pytest.CaptureFixture[str]) -> None:
    """What may be repeated stands in one pair of brackets."""
    for command in ("run", "bugs", "down"):
        usage = asked(capsys, command, "--help")[1].splitlines()[0]
        assert "[[" not in usage
        assert "]...]" not in usage


@pytest.mark.parametrize("command", ["--help", "demo", "demo --world sim", "topo ls", "topo show nvlink-8"])
def test_a_reader_that_goes_away_is_no_error(command: str) -> None:
    """``hmmnet ... | head -1``: not even in the middle of a run."""
    program = f"{sys.executable} -m hmmnet {command} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["--help", "topo ls", "topo show pcie-64 --json", "fault kinds"])
def test_standard_output_that_takes_no_more_is_one_line(command: str) -> None:
    """A full disk, whether it shows in the middle or when all is said."""
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m hmmnet {command} > /dev/full"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "hmmnet: standard output cannot be written: No space left on device\n")


@pytest.mark.parametrize("heavy", ["rich", "numpy", "zmq", "trio", "typer"])
def test_the_frame_loads_nothing_heavy(heavy: str) -> None:
    """The first line stands at once because what is slow to import waits until it is needed."""
    program = (
        f"import sys; from hmmnet.cli import exit_code; exit_code(['--help']); exit_code(['nonsense']); sys.exit({heavy!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", ["ps", "clean", "logs", "down"])
@pytest.mark.parametrize("heavy", ["zmq", "trio", "numpy"])
def test_commands_that_only_look_load_no_machine(command: str, heavy: str) -> None:
    """They read files."""
    program = f"import sys; from hmmnet.cli import exit_code; exit_code([{command!r}, 'nobody-here']); sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_suggestions_come_only_when_near() -> None:
    """Otherwise nothing is said."""
    assert did_you_mean("dwon", COMMANDS) == '; did you mean "down"?'
    assert did_you_mean("xyzzy", COMMANDS) == ""
    assert cli.FAILED == 1


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    """As it is, on stderr; exit code 2."""
    code, out, err = asked(capsys, "topo")
    assert (code, out) == (2, "")
    assert err.startswith("Usage: hmmnet topo")
    assert len(err.splitlines()) > 8


def test_a_file_is_named_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With the line of the byte that is no UTF-8."""
    file = tmp_path / "odd.toml"
    file.write_bytes(b'\nname = "\xff"\n')
    code, out, _ = asked(capsys, "topo", "check", str(file))
    assert code == 1
    assert out == f"{file}:2: byte 0xff is no UTF-8; save the file as UTF-8\n"


def test_a_command_in_the_background_can_be_terminated() -> None:
    """A shell starts those with Ctrl-C ignored; ``kill`` ends them all the same."""
    command = [sys.executable, "-m", "hmmnet", "campaign", "--seeds", "0:100000"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # noqa: PLW1509 - what a shell does
    ) as process:
        caught = 0
        while not caught >> (signal.SIGTERM - 1) & 1:
            status = Path(f"/proc/{process.pid}/status").read_text()
            caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
        process.terminate()
        try:
            assert process.wait(20) == 143
        finally:
            process.kill()
