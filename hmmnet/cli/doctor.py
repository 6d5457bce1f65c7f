"""``hmmnet doctor``: what this computer has and lacks for running a machine, each with its mend.

Every check is a function of facts, so that it can be tried with the facts of other computers; `examine` gathers this one's. A check that
cannot look says so and is no failure: containers hide half of ``/proc``.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hmmnet.errors import HmmnetError
from hmmnet.units import counted, show_rate, show_size

from . import FAILED
from .completion import topologies

if TYPE_CHECKING:
    from hmmnet.topology.model import Topology

Status = Literal["good", "note", "bad"]
STYLES = {"good": "[green]good[/]", "note": "[yellow]note[/]", "bad": "[red]bad [/]"}
DESCRIPTORS_OF_HOST = 40
"""Open files of a host process without devices: sockets, their wake-ups, logs (30 were counted)."""
DESCRIPTORS_PER_DEVICE = 10
"""Of the host process, for each device (9 were counted, with 2 and 8 devices, and one more until a device is ready)."""
HOST_BYTES = 100 << 20
DEVICE_BYTES = 10 << 20
"""Memory that a host and a device process need beside the modelled memory they use."""
MAPPINGS_PER_DEVICE = 16
UNLIMITED = -1


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and how to mend it (empty when nothing needs it)."""

    subject: str
    status: Status
    found: str
    mend: str = ""


def doctor(
    topology: Annotated[
        str, typer.Argument(autocompletion=topologies, help="The machine that is to run here: a preset's name, or a TOML file.")
    ] = "two-gpus",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings for programs.")] = False,
) -> int:
    """What this computer has and lacks for running a machine. Exit code 1 when something must be mended first."""
    from hmmnet.topology.load import load

    findings = examine(load(topology))
    if as_json:
        import json

        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        show(findings, topology)
    return FAILED if any(finding.status == "bad" for finding in findings) else 0


def show(findings: list[Finding], topology: str) -> None:
    """Print findings for a person."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hmmnet.observe.fitted import Fitted

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        mend = f"\n[cyan]{escape(finding.mend)}[/]" if finding.mend else ""
        table.add_row(STYLES[finding.status], escape(finding.subject), escape(finding.found) + mend)
    console.print(Fitted(table))
    bad = [finding.subject for finding in findings if finding.status == "bad"]
    verdict = f"[red]{escape(topology)} will not run here: {', '.join(bad)}[/]" if bad else f"[green]{escape(topology)} can run here[/]"
    console.print(f"\n{verdict}")


def examine(topology: Topology) -> list[Finding]:
    """Everything, in the order of what would stop a machine first."""
    devices = len(topology.devices)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reserved = max([sum(node.memory_bytes for node in topology.nodes), *(device.memory_bytes for device in topology.devices)])
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("system", lambda: system(platform.system(), platform.release())),
        ("Python", lambda: python(sys.version_info[:3], sys.maxsize, sysconfig.get_config_var("CONFIG_ARGS"))),
        ("ZeroMQ", zeromq),
        ("runtime folder", runtime_folder),
        ("open files", lambda: open_files(soft, hard, devices)),
        ("memory", lambda: memory(available_bytes(Path("/proc/meminfo"), Path("/sys/fs/cgroup")), devices)),
        ("address space", lambda: address_space(_limit(resource.RLIMIT_AS), _text("/proc/sys/vm/overcommit_memory"), reserved)),
        ("mappings", lambda: mappings(int(_text("/proc/sys/vm/max_map_count") or "65530"), devices)),
        ("shared memory", lambda: shared_memory(Path("/dev/shm"))),  # noqa: S108 - looked at, not written
        ("huge pages", lambda: huge_pages(_text("/sys/kernel/mm/transparent_hugepage/enabled"))),
        ("processors", lambda: processors(len(os.sched_getaffinity(0)), devices)),
        ("speed", lambda: speed(topology)),
    ]
    return [_looked(subject, check) for subject, check in checks]


def _looked(subject: str, check: Callable[[], Finding]) -> Finding:
    """What a check found, or that it could not look."""
    try:
        return check()
    except HmmnetError as error:
        cause, _, mend = str(error).partition("; ")
        return Finding(subject, "bad", cause, mend)
    except (OSError, ValueError, AttributeError) as error:
        return Finding(subject, "note", f"could not be looked at: {error}")


def _limit(which: int) -> int:
    soft, _ = resource.getrlimit(which)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def _text(path: str) -> str:
    """A file of the kernel's, without its line end; empty when it does not exist."""
    try:
        return Path(path).read_text().strip()
    except FileNotFoundError:
        return ""


def system(name: str, release: str) -> Finding:
    """The operating system."""
    if name != "Linux":
        return Finding("system", "bad", f"{name} {release}", "run it on Linux, or in a Linux container")
    return Finding("system", "good", f"{name} {release}")


def python(version: tuple[int, ...], largest: int, built_with: str | None) -> Finding:
    """The interpreter. `built_with` are the arguments of its configure script, where it has had one."""
    found = f"Python {'.'.join(map(str, version))} at {sys.executable}"
    if version < (3, 11):
        return Finding("Python", "bad", found, "install Python 3.11 or newer")
    if largest < 1 << 62:
        return Finding("Python", "bad", f"{found}, 32-bit", "install a 64-bit Python: modelled memories need the address space")
    if built_with is not None and "--enable-optimizations" not in built_with:
        slow = f"{found}, built without --enable-optimizations: simulations take longer"
        return Finding(
            "Python", "note", slow, "a distribution's own Python has them; pyenv takes PYTHON_CONFIGURE_OPTS=--enable-optimizations"
        )
    return Finding("Python", "good", found)


def zeromq() -> Finding:
    """libzmq and what it was built with."""
    import zmq

    found = f"libzmq {zmq.zmq_version()}, pyzmq {zmq.pyzmq_version()}"
    if not zmq.has("ipc"):
        return Finding("ZeroMQ", "note", f"{found}, without ipc", "start machines with --transport tcp")
    if not zmq.has("curve"):
        return Finding("ZeroMQ", "note", f"{found}, without CURVE", "machines cannot leave this computer; pyzmq's own wheels have it")
    return Finding("ZeroMQ", "good", f"{found}, with ipc and CURVE")


def runtime_folder() -> Finding:
    """Where machines keep sockets and logs."""
    from hmmnet.launcher.directory import base_directory

    folder = base_directory()
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("runtime folder", "bad", f"{folder} cannot be written", "set HMMNET_DIR to a folder of yours")
    return socket_paths(folder, os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize)


def socket_paths(folder: Path, free_bytes: int) -> Finding:
    """Whether the paths of sockets in `folder` are short enough, and whether logs have room."""
    from hmmnet.launcher.directory import SOCKET_NAME_MAX, SOCKET_PATH_MAX

    room = SOCKET_PATH_MAX - len(os.fsencode(folder)) - 1 - SOCKET_NAME_MAX
    found = f"{folder}, {show_size(free_bytes)} free"
    if free_bytes < 64 << 20:
        return Finding("runtime folder", "note", found, "logs will be cut: free some space, or set HMMNET_DIR to another disk")
    if room < len("default"):
        mend = "sockets go to a short folder under /tmp; set HMMNET_DIR to a short path to have them in one place"
        return Finding("runtime folder", "note", f"{found}; too long for a socket's path ({SOCKET_PATH_MAX} bytes)", mend)
    return Finding("runtime folder", "good", f"{found}; machines' names may have {min(room, 32)} letters before sockets move to /tmp")


def open_files(soft: int, hard: int, devices: int) -> Finding:
    """The limit on file descriptors, against what a host with so many devices needs."""
    needed = DESCRIPTORS_OF_HOST + DESCRIPTORS_PER_DEVICE * devices
    found = f"{soft if soft != resource.RLIM_INFINITY else 'any number'}; the host needs about {needed} for {counted(devices, 'device')}"
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Finding("open files", "good", found)
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return Finding("open files", "bad", found, f"ulimit -n {needed}")
    return Finding(
        "open files", "bad", found, f"the hard limit is {hard}: raise it to {needed} (limits.conf; docker run --ulimit nofile={needed})"
    )


def available_bytes(meminfo: Path, cgroup: Path) -> int:
    """Memory that can still be had: the kernel's estimate, or what a container's limit leaves. Raises ValueError when nothing tells."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    if "MemAvailable" not in lines:
        raise ValueError("the kernel does not tell how much memory is available")
    available = int(lines["MemAvailable"].split()[0]) << 10
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(available, 0)


def memory(available: int, devices: int) -> Finding:
    """Room for the processes; modelled memory costs what is touched."""
    needed = HOST_BYTES + DEVICE_BYTES * devices
    found = f"{show_size(available)} available; {devices + 1} processes need {show_size(needed)}, and modelled memory what is touched"
    if available < needed:
        return Finding("memory", "bad", found, "end something else, raise the container's limit, or take a smaller topology")
    return Finding("memory", "good", found)


def address_space(limit: int, overcommit: str, reserved: int) -> Finding:
    """Whether a process may reserve the largest modelled memory."""
    found = f"the largest reservation is {show_size(reserved)}"
    if limit != UNLIMITED and limit < 2 * reserved:
        return Finding("address space", "bad", f"{found}, the limit {show_size(limit)}", "ulimit -v unlimited")
    if overcommit == "2":
        mend = "sysctl vm.overcommit_memory=0, or a topology whose memories fit into this computer's"
        return Finding("address space", "bad", f"{found}, and the kernel counts reservations (vm.overcommit_memory=2)", mend)
    return Finding("address space", "good", f"{found}; reserving costs nothing here")


def mappings(most: int, devices: int) -> Finding:
    """vm.max_map_count: the host maps page arrays for every device."""
    needed = 1000 + MAPPINGS_PER_DEVICE * devices
    if most < needed:
        return Finding("mappings", "bad", f"a process may have {most}, about {needed} are needed", f"sysctl vm.max_map_count={needed}")
    return Finding("mappings", "good", f"a process may have {most:,}; each GiB of addresses in use takes one or a few")


def shared_memory(path: Path) -> Finding:
    """The rings that page data lie in are files without a name, which need no folder; but containers often have 64 MiB of it, and people
    look for that.
    """
    if not hasattr(os, "memfd_create"):
        return Finding("shared memory", "note", "this Python makes no files without a name (memfd)", "start machines with --transport ipc")
    found = "page data lie in files without a name (memfd) on their way"
    if not path.is_dir():
        return Finding("shared memory", "good", f"{found}; there is no {path}, and no need for it")
    room = os.statvfs(path)
    return Finding("shared memory", "good", f"{found}; the {show_size(room.f_bavail * room.f_frsize)} free in {path} are not needed")


def huge_pages(enabled: str) -> Finding:
    """Transparent huge pages make the first touch of modelled memory cheap."""
    chosen = enabled.partition("[")[2].partition("]")[0]
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    if chosen in ("always", "madvise"):
        return Finding("huge pages", "good", f"transparent huge pages: {chosen}")
    found = "transparent huge pages are off" if chosen else "this kernel has no transparent huge pages"
    mend = f"as root: echo madvise > {path}" if chosen else ""
    return Finding("huge pages", "note", f"{found}: first touches of modelled memory are slower", mend)


def processors(count: int, devices: int) -> Finding:
    """Cores, against processes that would like one each."""
    found = f"{count} for {devices + 1} processes"
    if count < 2:
        return Finding("processors", "note", f"{found}: they take turns", "leave --rate at auto: it slows the emulated clock to fit")
    return Finding("processors", "good", found)


def speed(topology: Topology) -> Finding:
    """What a stream moves now, and the clock that `--rate auto` would choose for it."""
    from hmmnet.fabric.measure import choose_rate, demanded_bytes_per_s

    measured = measured_bytes_per_s()
    rate = choose_rate(topology, measured)
    demanded = demanded_bytes_per_s(topology)
    found = f"{show_rate(measured)} from process to process; the links of {topology.name} want {show_rate(demanded)}"
    if rate >= 1:
        return Finding("speed", "good", f"{found}: the emulated clock keeps up with the wall's")
    return Finding("speed", "good", f"{found}: with --rate auto, an emulated second takes {1 / rate:,.0f} real ones")


def measured_bytes_per_s() -> float:
    """A short stream over ipc and a ring, as the host measures it at its start."""
    from functools import partial

    import trio

    from hmmnet.fabric.clock import EmulatedClock
    from hmmnet.fabric.measure import measure_bytes_per_s
    from hmmnet.launcher.scratch import scratch
    from hmmnet.wire.zmq_transport import ZmqTransport

    with scratch() as folder, ZmqTransport() as transport:
        return trio.run(partial(measure_bytes_per_s, transport, f"ipc://{folder}/measure", EmulatedClock(), ring=True))
