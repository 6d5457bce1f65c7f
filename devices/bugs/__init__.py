"""Drivers with bugs that real drivers had: each a small change to a good one, beside the change that mends it.

`hmmnet bugs` tells their stories and runs them (`hmmnet.bugs`). As models they are called ``bug:NAME:buggy`` and ``bug:NAME:fixed``:
a machine with one of them shows whether one's own tests find it.

Nothing good depends on this folder.
"""

from __future__ import annotations

_PLACES = {
    "ack-before-dma-ends": ("teardown", "AckFirst", "Waits"),
    "driver-lock-missing": ("ranges", "RangesUnlocked", "RangesLocked"),
    "eviction-deadlock": ("chunks", "ChunksOneByOne", "ChunksTogether"),
    "free-callback-lost": ("teardown", "FreesLost", "Gpu"),
    "huge-page-freed-whole": ("teardown", "FreesWhole", "Gpu"),
    "migration-storm": ("ranges", "MovesWhole", "MovesMissing"),
    "mprotect-there-and-back": ("protection", "NoUpgrade", "Gpu"),
    "owner-not-compared": ("protection", "IgnoresMigrations", "Gpu"),
    "page-held-over-a-fault": ("ranges", "FaultsWhileHolding", "FaultsAfterwards"),
    "pages-known-by-number": ("teardown", "ByNumber", "ByMirror"),
    "read-retry-skipped": ("protection", "NeverRetries", "Gpu"),
    "stale-after-restart": ("teardown", "KeepsTable", "Gpu"),
    "unregister-without-memory": ("teardown", "EvictsFirstFrame", "Gpu"),
}
"""For each bug the file here, the driver that has it, and the one that has not."""

_GPU = "hmmnet.devices.models.gpu:Gpu"


def _place(file: str, name: str) -> str:
    return _GPU if name == "Gpu" else f"hmmnet.devices.bugs.{file}:{name}"


MODELS = {
    f"bug:{bug}:{kind}": _place(file, name)
    for bug, (file, buggy, fixed) in _PLACES.items()
    for kind, name in (("buggy", buggy), ("fixed", fixed))
}
"""``module:class`` by model name."""
