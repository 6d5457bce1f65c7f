"""CURVE keys of one machine, and the file from which its peers read theirs. Without them tcp stays on this computer's loopback."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import zmq

from hmmnet.errors import HmmnetError

from .zmq_transport import CurveKeys


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """What a peer needs to know."""

    host_public: str
    peer_public: str
    peer_secret: str


def fresh_keys() -> CurveKeys:
    """New keys of a host, and of all its peers together."""
    return CurveKeys(*zmq.curve_keypair(), *zmq.curve_keypair())


def write_keys(path: Path, keys: CurveKeys) -> None:
    """Write what peers need to a new file that only its owner can read; the host's secret is not in it. Raises FileExistsError."""
    text = msgspec.json.encode(_File(keys.host_public.decode(), keys.peer_public.decode(), keys.peer_secret.decode()))
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)


def read_keys(path: Path) -> CurveKeys:
    """A peer's keys. Raises HmmnetError when they cannot be read, or are none."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise HmmnetError(f"{path}: cannot read the machine's CURVE keys: {error.strerror}; is the machine running, and yours?") from error
    except msgspec.MsgspecError as error:
        raise HmmnetError(f"{path}: these are no CURVE keys of a machine ({error}); start the machine anew") from error
    return CurveKeys(found.host_public.encode(), b"", found.peer_public.encode(), found.peer_secret.encode())
