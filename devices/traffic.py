"""How much a device has moved, for its figures."""

from __future__ import annotations

from dataclasses import dataclass, fields


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
        return {name: getattr(self, name) for name in TRAFFIC_FIELDS}

    def since(self, earlier: Traffic) -> Traffic:
        """What was added after the copy `earlier` was taken."""
        return Traffic(*(getattr(self, name) - getattr(earlier, name) for name in TRAFFIC_FIELDS))

    def add(self, other: Traffic) -> None:
        """Take another's counts in."""
        for name in TRAFFIC_FIELDS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


TRAFFIC_FIELDS = tuple(one.name for one in fields(Traffic))
