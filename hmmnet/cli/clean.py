"""``hmmnet clean``: remove what dead machines left behind."""

from __future__ import annotations

from typing import Annotated

import typer


def clean(as_json: Annotated[bool, typer.Option("--json", help="Print the names that were removed as a list.")] = False) -> int:
    """Remove the runtime directories of machines that are gone; running machines are not touched."""
    from hmmnet.launcher.directory import remove_stale

    removed = remove_stale()
    if as_json:
        import json

        print(json.dumps(removed))
    else:
        print(f"removed: {', '.join(removed)}" if removed else "nothing to remove")
    return 0
