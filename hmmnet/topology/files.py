"""Whether what somebody wrote is a file: a text that is too long for a name, or lies where nobody may look, is none."""

from __future__ import annotations

from pathlib import Path


def exists(path: Path) -> bool:
    """Whether anything of that name is there to be opened."""
    try:
        return path.exists()
    except OSError:  # pathlib asks the system, which has more to say than yes and no
        return False


def is_file(path: Path) -> bool:
    """Whether a file of that name is."""
    return exists(path) and path.is_file()
