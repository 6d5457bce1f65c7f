"""The device's samples: its figures, when they have changed, at most twice a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from hmmnet.sleeping import sleep
from hmmnet.wire.telemetry import SAMPLE_EVERY_S, Sample, pack_sample, plain_figures
from hmmnet.wire.transport import Channel

CLOCK_FIGURE = "emulated_s"
"""Changes all the time, and alone is no news."""


async def publish(
    channel: Channel, secret: bytes, device: str, zone: int, figures: Callable[[], dict[str, Any]], every_s: float = SAMPLE_EVERY_S
) -> None:
    """Send samples until cancelled; what nobody takes is lost, and nothing waits for it."""
    number = 0
    told: dict[str, Any] = {}
    while True:
        now = figures()
        news = {**now, CLOCK_FIGURE: None}
        if news != told:
            told = news
            number += 1
            try:
                channel.send_nowait(pack_sample(Sample(device, zone, number, plain_figures(now)), secret))
            except trio.WouldBlock:
                told = {}  # try again with the next sample
        await sleep(every_s)
