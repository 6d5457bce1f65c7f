"""How much a device has moved, for its figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Counters of what a context moved."""

    migrations: int = 0
    pages_in: int = 0
    pages_out: int = 0
    remote_read_bytes: int = 0
    remote_written_bytes: int = 0

    def as_map(self) -> dict[str, int]:
        """By name."""
        return dict(vars(self))

    def copy(self) -> Traffic:
        """One of its own, as it is now."""
        return Traffic(**vars(self))

    def since(self, earlier: Traffic) -> Traffic:
        """What was added after the copy `earlier` was taken."""
        before = vars(earlier)
        return Traffic(**{name: count - before[name] for name, count in vars(self).items()})

    def add(self, other: Traffic) -> None:
        """Take another's counts in."""
        counts = vars(self)
        for name, count in vars(other).items():
            counts[name] += count
