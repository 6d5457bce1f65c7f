"""Device models: what a device does with the machinery of this folder, by the name that a topology gives.

A model is spec, state and wiring: a frozen `Spec`, memory and mirrors that can be looked at, and the links handed in. Those that come
with hmmnet are found here, those with a bug in `hmmnet.devices.bugs`; anybody's are found through the entry point group ``hmmnet.devices``.
"""

from __future__ import annotations

from hmmnet.errors import HmmnetError
from hmmnet.plugins import MODELS, load

from .base import Device

BUILT_IN = {
    "gpu": "hmmnet.devices.models.gpu:Gpu",
    "dmirror": "hmmnet.devices.models.dmirror:Dmirror",
}


def load_model(name: str) -> type[Device]:
    """The model called `name`. Raises HmmnetError when there is none."""
    from hmmnet.devices.bugs import MODELS as WITH_BUGS

    found: type[Device] | None = load(MODELS, name, BUILT_IN | WITH_BUGS)
    if found is None:
        raise HmmnetError(
            f'no device model is called "{name}": there are {", ".join(BUILT_IN)}, and those that installed packages offer '
            "(entry point group hmmnet.devices); correct the device's model in the topology, or install its package"
        )
    return found
