"""A zygote whose children are no devices: they do what their settings say."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from hmmnet.devices.zygote import serve


def child(settings: dict[str, Any]) -> int | None:
    """``exit``: a status; ``raise``: an error's text; ``sleep_s``; ``file``: where to write what a child can see of itself. A device's
    settings: sleep.
    """
    if "file" in settings:
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        text = f"{os.getpid()} {Path('/proc/self/fd/0').readlink()} {descriptors} {threading.active_count()}"
        Path(settings["file"]).write_text(text)
    time.sleep(settings.get("sleep_s", 60 if "endpoint" in settings else 0))
    if "raise" in settings:
        raise RuntimeError(settings["raise"])
    return settings.get("exit")


serve(child, os.getppid())
