"""A plain memory that kernels are driven on, without any device: what they compute, apart from where their data are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hmmnet.devices.access import Load, LoadRange, Request, Steps, StoreRange, Update, open_access

BASE = 0x10_0000


class PlainMemory:
    """Bytes at addresses from `BASE` on."""

    def __init__(self, size: int = 1 << 23) -> None:
        self.bytes = np.zeros(size, dtype=np.uint8)
        self.requests = 0
        self._end = 0

    def place(self, values: npt.NDArray[Any], align: int = 64) -> int:
        """Store an array somewhere; its address."""
        self._end = -(-self._end // align) * align
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        self.bytes[self._end : self._end + len(raw)] = raw
        self._end += len(raw)
        return BASE + self._end - len(raw)

    def array(self, address: int, count: int, dtype: str = "<u8") -> npt.NDArray[Any]:
        """Elements at `address`."""
        return self.bytes[address - BASE : address - BASE + count * np.dtype(dtype).itemsize].view(dtype)

    def drive(self, steps: Steps) -> dict[str, Any]:
        """Run a kernel to its end."""
        answer: Any = None
        while True:
            try:
                request = steps.send(answer)
            except StopIteration as end:
                return dict(end.value)
            open_access(request)  # a request that no device would take fails here
            self.requests += 1
            answer = self.serve(request)

    def serve(self, request: Request) -> npt.NDArray[Any] | None:
        """Do one request."""
        if isinstance(request, LoadRange):
            return self.array(request.start, request.count, request.dtype.str).copy()
        if isinstance(request, StoreRange):
            self.array(request.start, request.values.size, request.values.dtype.str)[:] = request.values
            return None
        if isinstance(request, Load):
            size = request.dtype.itemsize
            return self.bytes.reshape(-1, size)[(request.addresses.astype(np.int64) - BASE) // size].view(request.dtype).reshape(-1)
        if isinstance(request, Update):
            before = np.empty_like(request.values)
            for lane, address in enumerate(request.addresses.tolist()):
                word = self.array(address, 1, request.values.dtype.str)
                before[lane] = word[0]
                word += request.values[lane]
            return before
        size = request.values.dtype.itemsize
        rows = request.values.reshape(-1, 1).view(np.uint8).reshape(-1, size)
        self.bytes.reshape(-1, size)[(request.addresses.astype(np.int64) - BASE) // size] = rows
        return None
