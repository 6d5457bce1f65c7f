"""The device contract, played against the models that come with hmmnet and against one that a user might write."""

from __future__ import annotations

import pytest

from hmmnet.devices.models import BUILT_IN, load_model
from hmmnet.devices.models.base import Device
from hmmnet.devices.models.gpu import Gpu
from hmmnet.devices.plugins import load
from hmmnet.errors import HmmnetError
from tests.devices.contract import CHECKS, Check, run


@pytest.mark.parametrize("model", BUILT_IN)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(check: Check, model: str) -> None:
    """Every model passes every check."""
    await run(check, model=model, memory_bytes=800 << 12)


class SmallSlabGpu(Gpu):
    """A user's model: a GPU whose driver subscribes to 64 KiB at a time."""

    slab_pages = 16


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract_of_a_model_from_elsewhere(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that an installed package offers is found by name, and passes too."""

    def offered(group: str, name: str, built_in: dict[str, str]) -> type[Device]:
        return SmallSlabGpu if (group, name) == ("hmmnet.devices", "small") else load(group, name, built_in)

    monkeypatch.setattr("hmmnet.devices.models.load", offered)
    await run(check, model="small", memory_bytes=800 << 12)


def test_unknown_model_is_named() -> None:
    """With what there is, and where others come from."""
    with pytest.raises(HmmnetError, match=r"gpu, dmirror.*hmmnet\.devices"):
        load_model("tpu")
