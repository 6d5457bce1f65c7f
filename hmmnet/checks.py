"""What a program may ask of a process, whichever way it reaches it: mistakes become a KernelError here, before anything is allocated."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import KernelError
from .pages import ADDRESS_BITS, PAGE_SHIFT, PAGES_MAX
from .plugins import KERNELS, POLICIES, absent, only_here

Arrayable = bytes | bytearray | memoryview | npt.NDArray[Any]
"""What a program stores."""
LOOK_PAGES_MAX = 1 << 28
"""Pages that one look at a page table tells of: 1 TiB of addresses."""


def check_whole(call: str, **numbers: object) -> None:
    """Raises KernelError(EINVAL), naming the argument, for what is no whole number."""
    for name, value in numbers.items():
        if not hasattr(value, "__index__"):
            raise KernelError(errno.EINVAL, call, f"{name} is {value!r}; a whole number is wanted")


def check_range(call: str, address: int, length: int) -> None:
    """Raises KernelError(EINVAL) for what is negative, or no whole number. Where a range ends depends on what is mapped: not checked."""
    if type(address) is not int or type(length) is not int:
        check_whole(call, address=address, length=length)
    if address < 0 or length < 0:
        raise KernelError(errno.EINVAL, call, f"{length} bytes at {address:#x} are no range of addresses")


def check_pages(call: str, address: int, pages: int) -> None:
    """Raises KernelError(EINVAL) unless `pages` pages from the one at `address` are pages of an address space, and few enough to list."""
    check_whole(call, address=address, pages=pages)
    if address < 0 or pages < 0 or (address >> PAGE_SHIFT) + pages > PAGES_MAX:
        raise KernelError(errno.EINVAL, call, f"{pages} pages at {address:#x} are no range of an address space of 2^{ADDRESS_BITS} bytes")
    if pages > LOOK_PAGES_MAX:
        raise KernelError(errno.EINVAL, call, f"{pages} pages are too many at once; ask for {LOOK_PAGES_MAX} at a time")


def check_file(call: str, offset: int, length: int) -> None:
    """Raises KernelError for a part of a file that makes no sense: EINVAL (negative), EFBIG (beyond what can be mapped)."""
    check_whole(call, offset=offset, length=length)
    if offset < 0 or length < 0:
        raise KernelError(errno.EINVAL, call, f"{length} bytes at byte {offset} are no part of a file")
    if offset + length > 1 << ADDRESS_BITS:
        raise KernelError(errno.EFBIG, call, f"byte {offset + length} is farther than a file can reach (2^{ADDRESS_BITS} bytes)")


def plain_arguments(kernel: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A kernel's arguments as a message can hold them; numpy's numbers become Python's. Raises KernelError(EINVAL), naming the argument."""
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        if type(value) is bytes or (type(value) is int and 0 <= value < 1 << 63):  # which surely can
            plain[name] = value
            continue
        plain[name] = value.item() if isinstance(value, np.generic) else value
        try:
            msgspec.msgpack.encode(plain[name])
        except (TypeError, ValueError, OverflowError) as error:
            raise KernelError(errno.EINVAL, "launch", f"argument {name} of {kernel} cannot be sent to a device: {error}") from error
    return plain


def not_found(error: KernelError, kernel: str, placement: str) -> KernelError | None:
    """What a device answered to a launch, with the mend, where it does not know what this process has registered; otherwise None."""
    for what, group, name in (("kernel", KERNELS, kernel), ("placement", POLICIES, placement)):
        mend = only_here(group, name) if error.why.startswith(absent(what, name)) else ""
        if mend and mend not in error.why:  # the host that answers a program may be in its process
            return KernelError(error.code, error.call, f"{error.why}; {mend}")
    return None


def as_type(call: str, dtype: str) -> np.dtype[Any]:
    """A numpy type that bytes in memory can be. Raises KernelError(EINVAL) for a `dtype` that is none, or of objects, or of no size."""
    try:
        kind = np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise KernelError(errno.EINVAL, call, f"there is no type {dtype!r}: {error}") from error
    if kind.hasobject or not kind.itemsize:
        raise KernelError(errno.EINVAL, call, f"no value of type {dtype!r} lies in memory")
    return kind


def as_value(call: str, value: float, dtype: str) -> bytes:
    """One value as a program stores it. Raises KernelError(EINVAL) for one that `dtype` does not hold, or a `dtype` that there is not."""
    try:
        kind = np.dtype(dtype)
        raw = np.array([value], dtype=kind)
        fits = kind.kind not in "iub" or raw[0] == value
    except (TypeError, ValueError, OverflowError) as error:
        raise KernelError(errno.EINVAL, call, f"{value!r} is no value of type {dtype!r}: {error}") from error
    if kind.hasobject:
        raise KernelError(errno.EINVAL, call, f"{value!r} is no value of type {dtype!r}: objects do not lie in memory")
    if not fits:
        raise KernelError(errno.EINVAL, call, f"{value!r} does not fit in type {dtype!r}")
    return raw.tobytes()


def as_bytes(data: Arrayable) -> npt.NDArray[np.uint8]:
    """Whatever a program stores, as bytes, without a copy where it lies in one piece."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(data, dtype=np.uint8)
