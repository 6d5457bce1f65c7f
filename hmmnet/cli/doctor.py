"""`hmmnet doctor`: what this computer has and lacks for running machines, each with its mend."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from hmmnet.units import show_size

from . import FAILED

Status = Literal["good", "limited", "bad"]
MARKS = {"good": "ok  ", "limited": "note", "bad": "BAD "}
DESCRIPTORS_PER_DEVICE = 16
MEMORY_MIN_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, what follows, and how to mend it (empty when nothing needs it)."""

    subject: str
    status: Status
    found: str
    mend: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Look at this computer: what hmmnet needs, what is there, and how to mend what is not. Exit code 1 when something is missing."""
    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(f"{MARKS[finding.status]}  {finding.subject:<{width}}  {finding.found}")
            if finding.mend:
                print(f"      {'':<{width}}  -> {finding.mend}")
    return FAILED if any(finding.status == "bad" for finding in findings) else 0


def examine() -> list[Finding]:
    """Everything, in the order of what matters most."""
    return [_system(), _python(), _zmq(), _processors(), _memory(), _overcommit(), _descriptors(), _directory(), _huge_pages()]


def _system() -> Finding:
    found = f"{platform.system()} {platform.release()}"
    if platform.system() != "Linux":
        return Finding("system", "bad", found, "hmmnet needs Linux: it relies on epoll, PR_SET_PDEATHSIG and CLOCK_MONOTONIC across processes")
    return Finding("system", "good", found)


def _python() -> Finding:
    found = f"Python {platform.python_version()} at {sys.executable}"
    return Finding("Python", "good" if sys.version_info >= (3, 11) else "bad", found)


def _zmq() -> Finding:
    import zmq

    found = f"libzmq {zmq.zmq_version()}, pyzmq {zmq.pyzmq_version()}"
    if not zmq.has("ipc"):
        return Finding("ZeroMQ", "limited", found + ", without ipc", "start machines with --transport tcp")
    curve = "" if zmq.has("curve") else "; without CURVE, so no tcp beyond this computer"
    return Finding("ZeroMQ", "good", found + curve)


def _processors() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        return Finding("processors", "limited", f"{count}", "host and devices take turns on it; the emulated clock will run slower (--rate auto sees to that)")
    return Finding("processors", "good", f"{count}")


def _memory() -> Finding:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        return Finding("memory", "limited", "/proc/meminfo does not tell what is available")
    found = f"{show_size(available)} available"
    if available < MEMORY_MIN_BYTES:
        return Finding("memory", "limited", found, f"a demo wants {show_size(MEMORY_MIN_BYTES)}; end something, or use smaller inputs")
    return Finding("memory", "good", found + "; modelled memories cost only what is touched")


def _overcommit() -> Finding:
    mode = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return Finding("address space", "bad", f"limited to {show_size(limit)}", "modelled memories are reserved whole: ulimit -v unlimited")
    if mode == "2":
        return Finding("address space", "limited", "the kernel counts reservations (vm.overcommit_memory=2)", "use topologies with memories that fit, or set it to 0")
    return Finding("address space", "good", "unlimited, reserved without commitment")


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    devices = soft // DESCRIPTORS_PER_DEVICE
    found = f"{soft} open files: enough for some {devices} devices in one machine"
    if soft < DESCRIPTORS_PER_DEVICE * 8:
        return Finding("open files", "bad", found, f"ulimit -n {min(hard, 65536)}")
    if soft < DESCRIPTORS_PER_DEVICE * 64:
        return Finding("open files", "limited", found, f"for larger topologies: ulimit -n {min(hard, 65536)}")
    return Finding("open files", "good", found)


def _directory() -> Finding:
    from hmmnet.launcher.directory import SOCKET_NAME_MAX, SOCKET_PATH_MAX, base_directory

    root = base_directory()
    length = len(os.fsencode(root)) + SOCKET_NAME_MAX
    nearest = root
    while not nearest.exists():
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK):
        return Finding("runtime folder", "bad", f"{root} cannot be made: {nearest} is not writable", "set HMMNET_DIR to a folder of yours")
    if length > SOCKET_PATH_MAX:
        return Finding("runtime folder", "limited", f"{root} is long: sockets go to a short folder under /tmp", "set HMMNET_DIR to a short path")
    return Finding("runtime folder", "good", str(root))


def _huge_pages() -> Finding:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists():
        return Finding("huge pages", "limited", "this kernel has no transparent huge pages", "first touches of modelled memory are slower")
    chosen = path.read_text().partition("[")[2].partition("]")[0]
    if chosen == "never":
        return Finding("huge pages", "limited", "transparent huge pages are off", f"echo madvise > {path} (as root) makes first touches of modelled memory faster")
    return Finding("huge pages", "good", f"transparent huge pages: {chosen}")
