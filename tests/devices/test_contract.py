"""The device contract, played against the models that come with hmmnet and against one that a user might write."""

from __future__ import annotations

import pytest

from hmmnet.devices.models import BUILT_IN, load_model
from hmmnet.devices.models.gpu import Gpu
from hmmnet.errors import HmmnetError
from hmmnet.plugins import MODELS, offered
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
async def test_contract_of_a_model_from_elsewhere(check: Check) -> None:
    """A model that somebody else offers is found by name, and passes too."""
    with offered(MODELS, "small", SmallSlabGpu):
        await run(check, model="small", memory_bytes=800 << 12)


def test_unknown_model_is_named() -> None:
    """With what there is, and where others come from."""
    with pytest.raises(HmmnetError, match=r"gpu, dmirror.*hmmnet\.devices"):
        load_model("tpu")
