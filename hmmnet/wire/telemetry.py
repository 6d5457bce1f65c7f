"""Samples: what a device tells about itself now and then, on a socket of its own, and may lose.

Telemetry never delays anything: PUB and SUB with a small queue, no answers, no repeats. The host keeps the newest sample of each device.
A sample carries a proof made with the machine's secret, so that somebody else on this computer cannot paint the pictures; it is not
encrypted. Whatever does not decode, or proves nothing, is counted and dropped.
"""

from __future__ import annotations

import hmac
from typing import Annotated, Any

import msgspec

from hmmnet.errors import ProtocolError

from .messages import ARGUMENT_BYTES_MAX, Name

SAMPLE_EVERY_S = 0.5
"""Real seconds between samples of a device that changes."""
PROOF_BYTES = 16
FIGURES_MAX = 256


class Sample(msgspec.Struct, array_like=True, frozen=True):
    """Figures of one life of a device: `number` counts samples up within the life that has `zone`."""

    device: Name
    zone: int
    number: int
    figures: Annotated[dict[Name, int | float | str], msgspec.Meta(max_length=FIGURES_MAX)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Sample)


def pack_sample(sample: Sample, secret: bytes) -> bytes:
    """One message: proof, then msgpack."""
    body = _encoder.encode(sample)
    return _proof(body, secret) + body


def unpack_sample(message: bytes, secret: bytes) -> Sample:
    """The sample in a message. Raises ProtocolError for garbage, too much, and a wrong proof."""
    if not PROOF_BYTES < len(message) <= ARGUMENT_BYTES_MAX:
        raise ProtocolError(f"a telemetry message of {len(message)} bytes")
    proof, body = message[:PROOF_BYTES], message[PROOF_BYTES:]
    if not hmac.compare_digest(proof, _proof(body, secret)):
        raise ProtocolError("a telemetry message that was not made with this machine's secret")
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"a telemetry message that cannot be decoded: {error}") from None


def _proof(body: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, body, "sha256")[:PROOF_BYTES]


def plain_figures(figures: dict[str, Any]) -> dict[str, int | float | str]:
    """What of `figures` a sample can carry."""
    return {name: value for name, value in figures.items() if isinstance(value, (int, float, str))}
