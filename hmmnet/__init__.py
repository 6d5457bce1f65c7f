"""hmmnet: a multi-GPU machine in software.

``hmmnet.launch("two-gpus")`` starts one for the calling program, ``hmmnet.attach("NAME")`` uses one that runs already,
``hmmnet.simulate(main, "two-gpus", seed=7)`` runs a program on one in virtual time. All are imported when first used, because
device processes import this package too and must stay small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import attach
    from .machine import launch
    from .sim import simulate

__all__ = ["attach", "launch", "simulate"]

_PLACES = {"attach": "hmmnet.client", "launch": "hmmnet.machine", "simulate": "hmmnet.sim"}


def __getattr__(name: str) -> Any:
    """The public names, imported on first use; the version is that of the installed package."""
    if name == "__version__":
        from importlib.metadata import version

        return version("hmmnet")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
