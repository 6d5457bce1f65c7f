"""Whether a file is there, for words that may be anything: the system refuses to look for some."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""What the system answers where no file can be. Where nobody may look one may be, and whoever reads it says what is wrong."""


def exists(path: Path) -> bool:
    """Whether anything of that name is there, or may be."""
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """Whether a file of that name is there, or may be."""
    mode = _mode(path)
    return mode != 0 and (mode is None or stat.S_ISREG(mode))


def _mode(path: Path) -> int | None:
    """0: nothing is there; None: nobody may look."""
    try:
        return path.stat().st_mode
    except OSError as error:
        return 0 if error.errno in ABSENT else None
    except ValueError:  # a zero byte
        return 0
