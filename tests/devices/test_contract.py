"""The device contract, played against the models that come with hmmnet and against one that a user might write."""

from __future__ import annotations

import pytest

from hmmnet.devices.models import load_model
from hmmnet.devices.models.gpu import Gpu
from hmmnet.errors import HmmnetError
from hmmnet.plugins import MODELS, offered
from hmmnet.testing import DeviceContract
from hmmnet.testing.device_contract import play, runs_jobs


class TestGpu(DeviceContract):
    """The GPU."""

    model = "gpu"


class TestDmirror(DeviceContract):
    """The kernel's test device."""

    model = "dmirror"


class SmallSlabGpu(Gpu):
    """A user's model: a GPU whose driver subscribes to 64 KiB at a time."""

    slab_pages = 16


class TestSmallSlabGpu(DeviceContract):
    """A model from elsewhere, as a class."""

    model = SmallSlabGpu


def test_a_model_is_found_by_name() -> None:
    """As a topology names it."""
    with offered(MODELS, "small", SmallSlabGpu):
        play(runs_jobs, "small", memory_bytes=800 << 12)
    with pytest.raises(HmmnetError, match='no device model is called "small"'):
        play(runs_jobs, "small", memory_bytes=800 << 12)


def test_unknown_model_is_named() -> None:
    """With what there is, and where others come from."""
    with pytest.raises(HmmnetError, match=r"gpu, dmirror.*hmmnet\.devices"):
        load_model("tpu")
