"""``python -m hmmnet.devices``: one device process, or the zygote from which the launcher forks many.

python -m hmmnet.devices NAME ENDPOINT --secret-file FILE [--log-folder FOLDER]
python -m hmmnet.devices --zygote
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys

from hmmnet.lifeline import die_with_parent

from .service import CONNECT_S, PATIENCE_S, run_device


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hmmnet.devices", description="A device process of an hmmnet machine.")
    parser.add_argument("name", nargs="?", help="the device's name in the machine's topology")
    parser.add_argument("endpoint", nargs="?", help="control endpoint of the host, such as ipc:///run/machine/control")
    parser.add_argument("--secret-file", help="file with the machine's secret (mode 0600)")
    parser.add_argument("--log-folder", default="", help="write JSON lines to NAME.jsonl in this folder, not warnings to stderr")
    parser.add_argument("--connect-s", type=float, default=CONNECT_S, help="seconds to wait for the host (default: %(default)g)")
    patience = "seconds of the host's silence, after its lease, until the device ends (default: %(default)g)"
    parser.add_argument("--patience-s", type=float, default=PATIENCE_S, help=patience)
    parser.add_argument("--zygote", action="store_true", help="serve the launcher on stdin: fork devices at its command")
    given = parser.parse_args(arguments)
    parent = os.getppid()
    if given.zygote:
        return zygote(parent)
    if not given.name or not given.endpoint or not given.secret_file:
        parser.error("NAME, ENDPOINT and --secret-file are needed (or --zygote)")
    die_with_parent(parent)
    return run_device(
        {
            "name": given.name,
            "endpoint": given.endpoint,
            "secret_file": given.secret_file,
            "log_folder": given.log_folder,
            "connect_s": given.connect_s,
            "patience_s": given.patience_s,
        }
    )


def zygote(launcher: int) -> int:
    """Import all that a device may need, then fork devices at the launcher's command.

    What a device imports by itself is memory of its own: numpy.ma alone, which np.unique asks for when it is first called, is 4 MB.
    So is what it puts into holes that a collection has left: there is none from here until `serve`.
    """
    gc.disable()
    random.Random("")  # noqa: S311 - chance from a text takes a hash, which newer Pythons import when it is first wanted
    import numpy.ma  # noqa: F401 - imported for the children

    from hmmnet.wire import keys, zmq_transport  # noqa: F401 - imported for the children

    from . import bugs  # noqa: F401 - imported for the children
    from .kernels import pointers, text, vector  # noqa: F401 - imported for the children
    from .models import dmirror, gpu  # noqa: F401 - imported for the children
    from .zygote import serve

    serve(run_device, launcher)
    return 0


if __name__ == "__main__":
    sys.exit(main())
