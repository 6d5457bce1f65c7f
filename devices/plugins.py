"""Device models and kernels by name: those that come with hmmnet, and anybody's through entry points.

Reading the installed packages' metadata costs tens of milliseconds and a few megabytes, so it happens only for names that are not built in.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def load(group: str, name: str, built_in: Mapping[str, str]) -> Any:
    """The object called `name`: ``module:attribute`` of `built_in`, or of entry point group `group`; None when there is none."""
    place = built_in.get(name)
    if place is not None:
        module, _, attribute = place.partition(":")
        return getattr(import_module(module), attribute)
    from importlib.metadata import entry_points

    for entry in entry_points(group=group, name=name):
        return entry.load()
    return None
