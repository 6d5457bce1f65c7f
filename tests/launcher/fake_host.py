"""A host that is none: it says what a host says, and writes down what it is told. Its behaviour is the machine's name.

``well``: every device is ready. ``loses``: it loses the first when it is told of anything. ``mute``: it never serves. ``fails``: it ends
with exit code 3 at once. ``stuck``: as well, and it ignores SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any


def tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


config = json.loads(sys.stdin.readline())
name = config["name"]
if name == "fails":
    sys.exit(3)
if name == "stuck":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with (Path(config["log_folder"]) / "told").open("w") as file:  # there before anybody hears of us
    if name != "mute":
        tell({"control": "ipc:///nowhere", "client": "ipc:///nowhere/client", "rate": 0.5})
        for device in config["topology"]["devices"]:
            tell({"device": device["name"], "state": "ready", "how": ""})
    for line in sys.stdin:
        file.write(line)
        file.flush()
        if name == "loses":
            tell({"device": config["topology"]["devices"][0]["name"], "state": "lost", "how": "gpu0 was silent"})
