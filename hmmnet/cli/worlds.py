"""``--world``: what a command runs its machine on."""

from __future__ import annotations

from enum import StrEnum

WORLD_HELP = "real: a host and device processes; sim: everything inside this process, in virtual time and repeatable."


class World(StrEnum):
    """The two worlds."""

    real = "real"
    sim = "sim"
