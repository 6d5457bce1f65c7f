"""``hmmnet doctor``: each check against the facts of computers that lack something, and all of them against this one."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from hmmnet.cli import doctor, exit_code
from hmmnet.topology.load import load

MEMINFO = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No stream is measured, and the runtime folder is ours."""
    monkeypatch.setenv("HMMNET_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "measured_bytes_per_s", lambda: 2e9)


def test_this_computer(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests run here, so the smallest machine can."""
    assert exit_code(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    subjects = [finding["subject"] for finding in findings]
    assert len(set(subjects)) == len(subjects)
    assert {"Python", "ZeroMQ", "runtime folder", "open files", "memory", "shared memory", "huge pages", "speed"} <= set(subjects)
    assert all(finding["mend"] for finding in findings if finding["status"] == "bad")
    assert exit_code(["doctor"]) == 0
    assert "two-gpus can run here" in capsys.readouterr().out


def test_a_folder_that_cannot_be(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict names it, the exit code says so, the other checks still run."""
    monkeypatch.setenv("HMMNET_DIR", "/proc/none")
    assert exit_code(["doctor", "nvlink-8"]) == 1
    out = capsys.readouterr().out
    assert "nvlink-8 will not run here: runtime folder" in out
    assert "set HMMNET_DIR" in out
    assert "processors" in out


def test_an_unknown_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """As everywhere: what was meant."""
    assert exit_code(["doctor", "nvlnk-8"]) == 2
    assert 'did you mean "nvlink-8"' in capsys.readouterr().err


def test_a_check_that_cannot_look_is_no_failure() -> None:
    """A container hides a file, a mend is not known."""

    def check() -> doctor.Finding:
        raise PermissionError(13, "Permission denied", "/proc/meminfo")

    finding = doctor._looked("memory", check)
    assert (finding.subject, finding.status) == ("memory", "note")
    assert "/proc/meminfo" in finding.found


def test_systems() -> None:
    """Linux, 64 bits, Python 3.11."""
    assert doctor.system("Linux", "6").status == "good"
    assert doctor.system("Darwin", "24").status == "bad"
    assert doctor.python((3, 11, 0), (1 << 63) - 1, "'--enable-optimizations' '--with-lto'").status == "good"
    assert doctor.python((3, 11, 0), (1 << 63) - 1, None).status == "good"
    assert doctor.python((3, 11, 0), (1 << 63) - 1, "'--enable-shared'").status == "note"
    assert doctor.python((3, 10, 9), (1 << 63) - 1, "").mend == "install Python 3.11 or newer"
    assert "64-bit" in doctor.python((3, 12, 0), (1 << 31) - 1, "").mend


def test_open_files() -> None:
    """The soft limit can be raised by oneself, the hard one not."""
    assert doctor.open_files(1024, 4096, 8).status == "good"
    assert doctor.open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY, 64).status == "good"
    assert doctor.open_files(256, 4096, 64).mend == "ulimit -n 680"
    assert doctor.open_files(256, resource.RLIM_INFINITY, 64).mend == "ulimit -n 680"
    assert "hard limit" in doctor.open_files(256, 256, 64).mend


def test_socket_paths() -> None:
    """A long path moves sockets, a full disk cuts logs: both are told, neither stops."""
    roomy = 1 << 40
    assert doctor.socket_paths(Path("/run/user/1000/hmmnet"), roomy).status == "good"
    assert "HMMNET_DIR" in doctor.socket_paths(Path("/" + "x" * 80), roomy).mend
    assert "logs" in doctor.socket_paths(Path("/run"), 1 << 20).mend


def test_available_memory(tmp_path: Path) -> None:
    """The kernel's estimate, or what a container's limit leaves of it."""
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    cgroup.mkdir()
    meminfo.write_text(MEMINFO)
    assert doctor.available_bytes(meminfo, cgroup) == 8_000_000 << 10
    (cgroup / "memory.current").write_text(f"{1 << 30}\n")
    (cgroup / "memory.max").write_text("max\n")
    assert doctor.available_bytes(meminfo, cgroup) == 8_000_000 << 10
    (cgroup / "memory.max").write_text(f"{3 << 30}\n")
    assert doctor.available_bytes(meminfo, cgroup) == 2 << 30
    meminfo.write_text("MemTotal: 1 kB\n")
    with pytest.raises(ValueError, match="how much"):
        doctor.available_bytes(meminfo, cgroup)


def test_memory() -> None:
    """Sixty-four device processes want more than two."""
    assert doctor.memory(500 << 20, 2).status == "good"
    assert doctor.memory(500 << 20, 64).status == "bad"


def test_address_space() -> None:
    """Reservations must fit a limit, and must not be counted."""
    assert doctor.address_space(doctor.UNLIMITED, "0", 64 << 30).status == "good"
    assert doctor.address_space(4 << 30, "0", 64 << 30).mend == "ulimit -v unlimited"
    assert "overcommit" in doctor.address_space(doctor.UNLIMITED, "2", 64 << 30).mend
    assert doctor.mappings(65530, 64).status == "good"
    assert doctor.mappings(1024, 64).mend.startswith("sysctl vm.max_map_count=")


def test_small_things(tmp_path: Path) -> None:
    """Notes: they cost speed only."""
    assert doctor.huge_pages("always [madvise] never").status == "good"
    assert "echo madvise" in doctor.huge_pages("always madvise [never]").mend
    assert doctor.huge_pages("").status == "note"
    assert doctor.processors(1, 2).status == "note"
    assert doctor.processors(2, 64).status == "good"
    assert doctor.shared_memory(tmp_path).status == "good"
    assert "no need for it" in doctor.shared_memory(tmp_path / "none").found


def test_speed(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hint: how much slower than the wall the emulated clock would be."""
    assert "real ones" in doctor.speed(load("nvlink-8")).found
    monkeypatch.setattr(doctor, "measured_bytes_per_s", lambda: 1e15)
    assert "keeps up" in doctor.speed(load("nvlink-8")).found


def test_the_measurement_itself() -> None:
    """A real stream over ipc, that leaves nothing behind."""
    assert doctor.measured_bytes_per_s() > 1e6
