"""Network namespaces, TUN devices and their addresses, by system calls: no tool has to be installed, and no privilege is needed.

`isolate` moves this process into a namespace of its own (with a user namespace around it where it is not root), so that whatever is made
here is gone with the process. A namespace for a device is made by a thread that leaves and ends (network namespaces belong to threads);
what stays is a descriptor of it, which a device process enters.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hmmnet.errors import HmmnetError

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCSIFADDR = 0x8916
_SIOCSIFDSTADDR = 0x8918
_SIOCSIFMTU = 0x8922
_IFF_UP = 0x1
_OWN_NAMESPACE = "/proc/thread-self/ns/net"
MTU = 16 << 10
"""Bytes of a packet: a chunk of 1 MiB is 64 of them, and one that is lost costs no more than that."""

_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Ends:
    """A cable's ends: descriptors of the TUN devices at the host and in the namespace, and of the namespace itself."""

    host: int
    device: int
    namespace: int

    def close(self) -> None:
        """Everything goes with the last descriptor, and the last process in the namespace."""
        for descriptor in (self.host, self.device, self.namespace):
            os.close(descriptor)


def isolate() -> None:
    """Move this process, which has one thread and no sockets yet, into a network namespace of its own. Raises HmmnetError.

    Where it is not root, it is root in a user namespace from then on, with the rights that it had over files.
    """
    uid, gid = os.getuid(), os.getgid()
    _unshare(CLONE_NEWNET | (CLONE_NEWUSER if uid else 0))
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _up("lo")


def enter(namespace: str) -> None:
    """Move this thread into the namespace behind the path `namespace` (``/proc/PID/fd/N``). Raises OSError."""
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(descriptor, CLONE_NEWNET), "setns")
    finally:
        os.close(descriptor)


def lay(name: str, host: str, device: str) -> Ends:
    """A cable between address `host` here and address `device` in a new namespace; interface `name` at both ends. Raises HmmnetError."""
    try:
        here = _tun(name, host, device)
        try:
            there, namespace = _elsewhere(
                lambda: (_tun(name, device, host), os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
            )
        except BaseException:
            os.close(here)
            raise
    except OSError as error:
        raise HmmnetError(f"a network cable cannot be laid here: {error.strerror}; it needs /dev/net/tun and namespaces") from error
    return Ends(here, there, namespace)


def _elsewhere(make: Callable[[], T]) -> T:
    """What `make` makes in a new network namespace."""
    made: list[T] = []
    failed: list[OSError] = []

    def leave() -> None:
        try:
            _unshare(CLONE_NEWNET)
            _up("lo")
            made.append(make())
        except (OSError, HmmnetError) as error:
            failed.append(error if isinstance(error, OSError) else OSError(errno.EPERM, str(error)))

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _tun(name: str, own: str, other: str) -> int:
    """A TUN device with an address at either end, up; its descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", name.encode(), MTU))
            fcntl.ioctl(control, _SIOCSIFADDR, _address(name, own))
            fcntl.ioctl(control, _SIOCSIFDSTADDR, _address(name, other))
        _up(name)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _address(name: str, address: str) -> bytes:
    """struct ifreq with an IPv4 address."""
    return struct.pack("16sHH4s16x", name.encode(), socket.AF_INET, 0, socket.inet_aton(address))


def _up(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        asked = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16s24x", name.encode()))
        (flags,) = struct.unpack_from("H", asked, 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags | _IFF_UP))


def _unshare(flags: int) -> None:
    try:
        _check(_libc.unshare(flags), "unshare")
    except OSError as error:
        raise HmmnetError(
            f"this process cannot have a network namespace of its own ({error.strerror}); run it as root, or allow user namespaces"
        ) from error


def _check(result: int, call: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
