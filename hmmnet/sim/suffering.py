"""What goes wrong inside devices while a fault acts: also inside those that start, or start again, meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from hmmnet.faults.effects import DeviceEffect


class Suffering:
    """An effect in every device whose name matches; calling it ends it."""

    def __init__(self, effect: DeviceEffect) -> None:
        self._effect = effect
        self._undos: dict[str, Callable[[], None]] = {}

    def begin(self, name: str, device: Any) -> None:
        """The device called `name` suffers it, if it is meant, in place of an earlier life of it."""
        if fnmatchcase(name, self._effect.device):
            self._undos[name] = device.suffer(self._effect)

    def fired(self) -> int:
        """1 once any device has suffered it, else 0."""
        return int(bool(self._undos))

    def __call__(self) -> None:
        """It ends in every device."""
        for undo in self._undos.values():
            undo()
