"""Test *your* code on a machine of several GPUs: a pytest plugin, and the contracts that device models and policies must keep.

The plugin (`plugin`) is there as soon as hmmnet is installed::

    @pytest.mark.seeds(20)
    @pytest.mark.faults(loss=0.05)
    def test_sum_survives_a_bad_cable(simulated_machine):
        process = simulated_machine.process()
        a = process.malloc(1 << 20)
        process.write(a, bytes(1 << 20))
        assert process.launch("reduction", "gpu0", a=a, n=1 << 17).results == {"sum": 0}

`README.md` in this folder tells of fixtures, markers and options. In a test that runs under trio a machine's methods are awaited, in every
other test they block. What is exported here is imported when it is first used: pytest starts no slower because hmmnet is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import outcomes
    from .device_contract import DeviceContract
    from .frozen import FrozenMachine
    from .idle import IdleMarkerWarning
    from .migrations import Migrations
    from .policy_contract import PolicyContract
    from .shrink import shrink
    from .worlds import Simulate

__all__ = ["DeviceContract", "FrozenMachine", "IdleMarkerWarning", "Migrations", "PolicyContract", "Simulate", "outcomes", "shrink"]

_PLACES = {
    "DeviceContract": "hmmnet.testing.device_contract",
    "FrozenMachine": "hmmnet.testing.frozen",
    "IdleMarkerWarning": "hmmnet.testing.idle",
    "Migrations": "hmmnet.testing.migrations",
    "PolicyContract": "hmmnet.testing.policy_contract",
    "Simulate": "hmmnet.testing.worlds",
    "outcomes": "hmmnet.testing.outcomes",
    "shrink": "hmmnet.testing.shrink",
}


def __getattr__(name: str) -> Any:
    """The public names, imported on first use."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_PLACES[name])
    value = module if name == "outcomes" else getattr(module, name)
    globals()[name] = value  # also where importing a module of the same name has put that
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
