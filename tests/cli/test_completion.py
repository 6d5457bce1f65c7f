"""What a shell offers for the word that is being typed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hmmnet.campaign.scenarios import SCENARIOS
from hmmnet.cli import COMMANDS, COMPLETION, exit_code
from hmmnet.topology.load import preset_names
from hmmnet.workloads.registry import workload_names

from .test_looking import machine


def offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What bash is answered when TAB is pressed behind the last of `words`."""
    monkeypatch.setenv(COMPLETION, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(("hmmnet", *words)))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    assert exit_code([]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.split()


def test_commands_and_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them; those of groups; nothing of a command is imported to name it."""
    for name in ("hmmnet.cli.selftest", "hmmnet.cli.bench"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert offered(monkeypatch, capsys, "") == list(COMMANDS)
    assert offered(monkeypatch, capsys, "s") == [name for name in COMMANDS if name.startswith("s")]
    assert "hmmnet.cli.selftest" not in sys.modules
    assert offered(monkeypatch, capsys, "topo", "s") == ["show"]
    assert offered(monkeypatch, capsys, "up", "--na") == ["--name"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("up", ""), preset_names()),
        (("doctor", ""), preset_names()),
        (("demo", "--topology", ""), preset_names()),
        (("run", "vector_add", "--topology", ""), preset_names()),
        (("topo", "show", ""), preset_names()),
        (("topo", "check", preset_names()[0], ""), preset_names()),
        (("run", ""), list(workload_names())),
        (("sweep", ""), ["all", *SCENARIOS]),
    ],
    ids=" ".join,
)
def test_names_of_what_comes_with_hmmnet(
    words: tuple[str, ...], names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All where nothing is typed yet, those that begin so where something is; for others a shell offers files."""
    assert offered(monkeypatch, capsys, *words) == names
    start = names[-1][:3]
    assert offered(monkeypatch, capsys, *words[:-1], start) == [name for name in names if name.startswith(start)]
    assert offered(monkeypatch, capsys, *words[:-1], "./mine.to") == []


def test_machines_and_their_devices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Machines by name; devices of the machine that is named, or of all that run; those of a dead machine are none."""
    running = [machine("first"), machine("second", devices=3)]
    dead = machine("third", devices=5)
    dead.release()
    try:
        for words in (("ps",), ("down", "first"), ("logs",), ("check",), ("run", "vector_add", "--on"), ("fault", "ls", "-m")):
            assert offered(monkeypatch, capsys, *words, "") == ["first", "second", "third"]
            assert offered(monkeypatch, capsys, *words, "se") == ["second"]
        for words in (("fault", "crash"), ("fault", "unplug"), ("fault", "hold"), ("fault", "partition")):
            assert offered(monkeypatch, capsys, *words, "") == ["gpu0", "gpu1", "gpu2"]
            assert offered(monkeypatch, capsys, words[0], words[1], "-m", "first", "") == ["gpu0", "gpu1"]
        assert offered(monkeypatch, capsys, "logs", "first", "--process", "") == ["host", "launcher", "gpu0", "gpu1"]
        assert offered(monkeypatch, capsys, "logs", "-p", "gpu2") == ["gpu2"]
    finally:
        for directory in (*running, dead):
            directory.remove()


def test_a_place_that_cannot_be_used_has_no_machines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing is offered, and nothing is complained of in the middle of a line."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HMMNET_DIR", str(tmp_path / "file"))
    assert offered(monkeypatch, capsys, "ps", "") == []
    assert offered(monkeypatch, capsys, "fault", "crash", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_is_shown_and_put_in_place(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """For the shell that is named, or that $SHELL names; what is put in place is what is shown."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert exit_code(["--show-completion", shell]) == 0
    shown = capsys.readouterr().out.strip()
    assert COMPLETION in shown
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert exit_code(["--install-completion"]) == 0
    path = Path(capsys.readouterr().out.strip().rpartition(" ")[2])
    assert path.is_relative_to(tmp_path)
    assert shown in path.read_text()


@pytest.mark.parametrize(
    ("shell", "words", "says"),
    [
        ("", [], "$SHELL does not say which shell; say which: hmmnet --install-completion bash"),
        ("/bin/tcsh", [], '"tcsh" is no shell that words are completed in'),
        ("/bin/bash", ["fihs"], 'did you mean "fish"?'),
        ("/bin/bash", ["bash", "zsh"], "one shell is wanted, not 2"),
    ],
)
def test_another_shell_is_refused(
    shell: str, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, with what can be had."""
    monkeypatch.setenv("SHELL", shell)
    assert exit_code(["--install-completion", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.count("\n") == 1


def test_bash_completes(tmp_path: Path) -> None:
    """The script does in a real shell what it is for."""
    bash = shutil.which("bash")
    assert bash is not None
    command = tmp_path / "hmmnet"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m hmmnet "$@"\n')
    command.chmod(0o755)
    script = """
    eval "$(hmmnet --show-completion bash)"
    COMP_WORDS=(hmmnet up two) COMP_CWORD=2
    _hmmnet_completion hmmnet
    echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        [bash, "--norc", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("two-gpus\n", "")
