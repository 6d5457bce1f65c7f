"""``hmmnet topo``: presets, mistakes and pictures, for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from hmmnet.cli import exit_code
from hmmnet.topology.load import load, preset_names

BAD = '[[memory]]\nname = "ram"\nsize = "64 GB/s"\n[[link]]\na = "ram"\nb = "rma"\nbandwith = "1 GB/s"\n'


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each preset, the default first; as data with sizes."""
    assert exit_code(["topo", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *preset_names()]
    assert exit_code(["topo", "ls", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["pcie-64"]["devices"] == 64
    assert rows["two-gpus"]["device_memory_bytes"] == 2 * (16 << 30)


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    """Parts, links and routes."""
    assert exit_code(["topo", "show", "grace-hopper"]) == 0
    out = capsys.readouterr().out
    for text in ("hopper  gpu 96 GiB coherent", "375 / 297 GB/s", "300 ns"):
        assert text in out
    assert exit_code(["topo", "show", "pcie-64"]) == 0
    assert "too many" in capsys.readouterr().out
    assert exit_code(["topo", "show", "two-gpus", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [device["name"] for device in data["devices"]] == ["gpu0", "gpu1"]
    assert len(data["routes"]) == 6


def test_a_preset_is_what_a_machine_of_ones_own_begins_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its text, comments and all, with a schema that editors find wherever the copy is; the copy is the same machine."""
    assert exit_code(["topo", "show", "nvlink-8", "--toml"]) == 0
    text = capsys.readouterr().out
    schema, _, rest = text.partition("\n")
    assert Path(schema.removeprefix("#:schema ")).is_file()
    assert rest.startswith("# Eight H100-class GPUs")
    mine = tmp_path / "mine.toml"
    mine.write_text(text)
    assert load(mine) == load("nvlink-8")
    assert exit_code(["topo", "show", str(mine), "--toml"]) == 0
    assert capsys.readouterr().out == text
    assert exit_code(["topo", "show", "nvlink-8", "--toml", "--json"]) == 2


def test_a_table_that_does_not_fit_is_not_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A file gets it as wide as it is; on a terminal a sentence says how wide that would be."""
    monkeypatch.setenv("COLUMNS", "40")
    assert exit_code(["topo", "show", "nvlink-8"]) == 0
    assert "gpu0  gpu1  gpu2" in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert exit_code(["topo", "show", "nvlink-8"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "needs a terminal 67 columns wide (--json lists them)" in told


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every mistake of every file, one line each; files that are good are said to be."""
    bad = tmp_path / "bad.toml"
    bad.write_text(BAD)
    assert exit_code(["topo", "check", str(bad), "two-gpus", "nothing.toml"]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.removeprefix(str(bad)).split(": ")[0] for line in lines[:3]] == [":3", ":6", ":7"]
    assert lines[3] == "two-gpus: good: 2 devices, 2 links"
    assert "nothing.toml: cannot be read" in lines[4]
    assert "4 mistakes" in err
    assert exit_code(["topo", "check", "two-gpus", "dmirror-4"]) == 0


def test_check_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an editor or a CI job reads."""
    bad = tmp_path / "bad.toml"
    bad.write_text(BAD)
    assert exit_code(["topo", "check", "--json", str(bad)]) == 1
    problems = json.loads(capsys.readouterr().out)
    assert [(problem["line"], problem["field"]) for problem in problems] == [(3, "size"), (6, "b"), (7, "bandwith")]
    assert problems[2]["mend"].startswith('did you mean "bandwidth"?')
    assert exit_code(["topo", "check", "--json", "nvlink-8"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"a = \xff\n", ":1: byte 0xff is no UTF-8"), (b"#" * ((1 << 20) + 1), "larger than 1 MiB"), (None, "cannot be read")],
    ids=["bytes", "size", "folder"],
)
def test_what_is_no_topology(content: bytes | None, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, wherever it is named."""
    path = tmp_path / "x.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert exit_code(["topo", "check", str(path)]) == 1
    assert text in capsys.readouterr().out
    assert exit_code(["topo", "show", str(path)]) == 2
    assert text in capsys.readouterr().err


def test_an_endless_file_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """Only so much is read."""
    assert exit_code(["topo", "check", "/dev/zero"]) == 1
    assert "larger than" in capsys.readouterr().out


def test_slips_are_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset's name, a file's name, a preset with an ending."""
    monkeypatch.chdir(tmp_path)
    Path("machine.toml").write_text("")
    for given, meant in (("nvlink8", "nvlink-8"), ("machin.toml", "machine.toml"), ("pcie-64.toml", "pcie-64")):
        assert exit_code(["topo", "show", given]) == 2
        assert f'"{meant}"' in capsys.readouterr().err


def test_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tree here, a picture in a file or on standard output."""
    assert exit_code(["topo", "draw", "two-gpus"]) == 0
    assert "gpu[0-1]" in capsys.readouterr().out
    picture = tmp_path / "two.svg"
    assert exit_code(["topo", "draw", "two-gpus", "--svg", str(picture)]) == 0
    ET.parse(picture)
    capsys.readouterr()
    assert exit_code(["topo", "draw", "two-gpus", "--svg", "-"]) == 0
    ET.fromstring(capsys.readouterr().out)
    assert exit_code(["topo", "draw", "two-gpus", "--svg", str(tmp_path / "no" / "two.svg")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_reading_a_topology_loads_little() -> None:
    """The loader pulls in no terminal, network or graph library: device processes and the host import it."""
    code = "import sys, hmmnet.topology.load, hmmnet.observe.counters; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"rich", "typer", "trio", "zmq", "networkx", "importlib.metadata"} & set(loaded)
