"""A machine without processes: one flat memory, the kernels written out plainly, and a note of which pages a device touched last.

Workloads and the demo are tested on it; whether the real machine gives the same is for tests/system to say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hmmnet.program import JobResult, Mapping, Residency
from hmmnet.words import tokenize

BASE = 0x10000


class FlatProcess:
    """Memory from BASE on; only what workloads call."""

    pid = 1

    def __init__(self, machine: FlatMachine) -> None:
        self.machine = machine
        self.memory = np.zeros(64 << 20, dtype=np.uint8)
        self.end = BASE
        self.exited = False
        self.on: dict[int, str] = {}

    async def mmap(self, length: int, protection: str = "rw", address: int | None = None) -> int:
        at = self.end
        self.end += -(-length // 4096) * 4096
        return at

    async def write(self, address: int, data: npt.NDArray[np.uint8]) -> None:
        self.memory[address - BASE : address - BASE + len(data)] = data

    async def read_array(self, address: int, dtype: str, count: int) -> npt.NDArray[Any]:
        for page in range(address >> 12, (address + count * np.dtype(dtype).itemsize + 4095) >> 12):
            self.on.pop(page, None)
        return self.view(address, dtype, count).copy()

    def view(self, address: int, dtype: str, count: int) -> npt.NDArray[Any]:
        return self.memory[address - BASE : address - BASE + count * np.dtype(dtype).itemsize].view(dtype)

    def word(self, address: int) -> int:
        return int(self.view(address, "<u8", 1)[0])

    async def launch(self, kernel: str, device: str, placement: str = "demand", **arguments: Any) -> JobResult:
        self.machine.launched.append((kernel, device, placement))
        results = getattr(self, kernel)(**arguments) or {}
        written = arguments.get("out", BASE)
        self.on.update(dict.fromkeys(range(written >> 12, (written + 8 * arguments["n"] + 4095) >> 12), device))
        return JobResult({k: v + self.machine.error for k, v in results.items()}, {"fault_groups": 1})

    def vector_add(self, a: int, b: int, out: int, n: int) -> None:
        self.view(out, "<f8", n)[:] = self.view(a, "<f8", n) + self.view(b, "<f8", n) + self.machine.error

    def reduction(self, a: int, n: int) -> dict[str, int]:
        return {"sum": int(self.view(a, "<i8", n).sum())}

    def list_walk(self, heads: int, n: int, out: int) -> None:
        for i, head in enumerate(self.view(heads, "<u8", n).tolist()):
            total = self.machine.error
            while head:
                total += self.word(head + 8)
                head = self.word(head)
            self.view(out, "<u8", n)[i] = total

    def tree_search(self, root: int, keys: int, n: int, out: int) -> None:
        for i, key in enumerate(self.view(keys, "<u8", n).tolist()):
            at = root
            while at and self.word(at) != key:
                at = self.word(at + (8 if key < self.word(at) else 16))
            self.view(out, "<u8", n)[i] = (self.word(at + 24) if at else (1 << 64) - 1) ^ self.machine.error

    def word_count(self, text: int, length: int, words: int, n: int, out: int) -> None:
        found = tokenize(self.view(text, "u1", length)).hashes
        counts = np.searchsorted(self.view(words, "<u8", n), found)
        self.view(out, "<u8", n)[:] = np.bincount(counts, minlength=n) + self.machine.error

    async def migrate(self, address: int, length: int, to: str) -> int:
        pages = range(address >> 12, (address + length) >> 12)
        moved = [page for page in pages if self.on.get(page, "host") != to]
        for page in moved:
            self.on[page] = to
        return 4096 * len(moved)

    async def pagemap(self, address: int, pages: int) -> bytes:
        first = address >> 12
        return bytes(ord("P" if self.on.get(page, "host") == "host" else "S") for page in range(first, first + pages))

    async def pagemap_words(self, address: int, pages: int) -> npt.NDArray[np.uint64]:
        raise AssertionError("no workload looks at pagemap words")

    async def smaps(self) -> list[Mapping]:
        raise AssertionError("no workload looks at smaps")

    async def oom_score(self) -> int:
        raise AssertionError("no workload asks the OOM killer")

    async def set_oom_score_adj(self, value: int) -> None:
        raise AssertionError("no workload asks the OOM killer")

    async def clear_refs(self, *, soft_dirty: bool = True) -> None:
        raise AssertionError("no workload clears references")

    async def kill(self, *, out_of_memory: bool = False) -> None:
        self.exited = True

    async def residency(self, address: int, pages: int) -> Residency:
        owners = ("host", *self.machine.device_names)
        first = address >> 12
        return Residency(owners, np.array([owners.index(self.on.get(p, "host")) for p in range(first, first + pages)], dtype=np.int16))

    async def exit(self) -> None:
        self.exited = True


class FlatMachine:
    """Two devices that exist in name only; `error` is added to every result."""

    device_names = ("gpu0", "gpu1")

    def __init__(self) -> None:
        self.error = 0
        self.lost: set[str] = set()
        self.time_s = 0.0
        self.launched: list[tuple[str, str, str]] = []
        self.processes: list[FlatProcess] = []

    async def create_process(self) -> FlatProcess:
        self.processes.append(FlatProcess(self))
        return self.processes[-1]

    def emulated_s(self) -> float:
        self.time_s += 0.001
        return self.time_s

    async def report(self) -> dict[str, Any]:
        return {"devices": {name: {"state": "lost" if name in self.lost else "ready"} for name in self.device_names}}
