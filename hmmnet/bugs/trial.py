"""Runs a bug's scenario on a simulated machine whose devices have the bug, or have it mended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from hmmnet.errors import HmmnetError
from hmmnet.sim import SimulatedMachine, simulate
from hmmnet.topology.load import load
from hmmnet.topology.model import Topology

from .library import Bug
from .scenarios.found import Found

Kind = Literal["buggy", "fixed"]
KINDS: tuple[Kind, ...] = ("buggy", "fixed")
MEMORY_BYTES = 4 << 20
"""Of each device: little, so that memory runs short at once."""
LIMIT_S = 600.0
"""Virtual seconds; a scenario notices by itself when nothing goes on."""


@dataclass(frozen=True)
class Trial:
    """What a scenario came to: `found` is what was wrong, empty if nothing was. `seed` is the first that found it, else the last."""

    bug: str
    kind: Kind
    found: str
    seed: int

    @property
    def as_told(self) -> bool:
        """Whether the bug shows where it is, and nowhere else."""
        return bool(self.found) == (self.kind == "buggy")

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "as_told": self.as_told}


def try_bug(bug: Bug, kind: Kind, seed: int | None = None) -> Trial:
    """Run `bug` with the driver of `kind`, from `seed` or from each of the bug's seeds until one finds something."""
    machine = with_model(f"bug:{bug.name}:{kind}")
    seeds = range(bug.seeds) if seed is None else range(seed, seed + 1)
    number = seeds.start
    for number in seeds:
        try:
            simulate(inspected(bug), machine, seed=number, limit_s=LIMIT_S)
        except HmmnetError as wrong:
            return Trial(bug.name, kind, str(wrong), number)
    return Trial(bug.name, kind, "", number)


def with_model(model: str) -> Topology:
    """Two devices of `model` with little memory."""
    plain = load("two-gpus")
    return replace(plain, devices=tuple(replace(device, model=model, memory_bytes=MEMORY_BYTES) for device in plain.devices))


def inspected(bug: Bug) -> Callable[[SimulatedMachine], Awaitable[None]]:
    """The scenario, and after it a look at the IOMMU: a use of what was to be dropped is a bug even if nobody noticed."""

    async def main(machine: SimulatedMachine) -> None:
        await bug.scenario(machine)
        for name, figures in (await machine.report())["devices"].items():
            if figures["iommu_refused"]:
                raise Found(f"{name} used a translation that it had been told to drop: {figures['iommu_last']}")

    return main
