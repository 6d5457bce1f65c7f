"""The machine's secret: whoever can read its file may join the machine. It keeps other users and other machines' processes out.

It is compared in constant time and never logged. It does not encrypt: beyond this computer, CURVE does (`zmq_transport.CurveKeys`).
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from hmmnet.errors import HmmnetError

SECRET_BYTES = 32


def new_secret() -> bytes:
    """A fresh secret."""
    return secrets.token_bytes(SECRET_BYTES)


def write_secret(path: Path, secret: bytes) -> None:
    """Write `secret` to a new file that only its owner can read. Raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)


def read_secret(path: Path) -> bytes:
    """The secret in `path`. Raises HmmnetError when it cannot be read, is open to others, or has the wrong length."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(SECRET_BYTES + 1)
    except OSError as error:
        raise HmmnetError(f"{path}: cannot read the machine's secret: {error.strerror}; is the machine running, and yours?") from error
    if mode & 0o077:
        raise HmmnetError(f"{path}: the machine's secret is open to others (mode {mode & 0o777:o}); chmod 600 it")
    if len(secret) != SECRET_BYTES:
        raise HmmnetError(f"{path}: {len(secret)} bytes are no machine secret of {SECRET_BYTES}; start the machine anew")
    return secret


def same_secret(one: bytes, other: bytes) -> bool:
    """Compare without telling by timing where they differ."""
    return hmac.compare_digest(one, other)
