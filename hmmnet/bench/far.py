"""The other processes of a benchmark, which take commands from the measuring one, a line each.

They are in process groups of their own: a Ctrl-C at the terminal is for the measuring process, which ends them. (Not in sessions: Linux
shares processor time between sessions first, so that threads of two would be treated unlike those of one.) There is nothing in them to be
lost, so they are ended without ceremony; if the measuring process is killed, their standard input ends, and so do they.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import IO

from hmmnet.errors import PeerError
from hmmnet.launcher.processes import child_environment


def start(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """A Python process with hmmnet importable."""
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=stdout, text=True, env=child_environment(), process_group=0
    )


class Far:
    """``python -m MODULE ARGUMENTS`` as a process to talk to."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = start("-m", module, *arguments)

    def tell(self, command: str) -> None:
        """Give a command."""
        stdin = _stream(self._process.stdin)
        stdin.write(f"{command}\n")
        stdin.flush()

    def answer(self) -> str:
        """The next line that it says. Raises RuntimeError when it has ended."""
        line = _stream(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended early (exit status {self._process.wait()}); its message is above")
        return line

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        _stream(self._process.stdin).close()
        _stream(self._process.stdout).close()


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None, "it was started with pipes"
    return stream


def quietly(main: Callable[[], None]) -> None:
    """Be such a process: run `main`, and end without a word when the measuring one was interrupted, its pipes and streams with it."""
    try:
        main()
    except* (BrokenPipeError, PeerError):
        os._exit(1)
