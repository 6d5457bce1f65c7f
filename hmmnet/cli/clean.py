"""``hmmnet clean``: remove what dead machines left behind."""

from __future__ import annotations

from typing import Annotated

import typer


def clean(as_json: Annotated[bool, typer.Option("--json", help="Print the names that were removed as a list.")] = False) -> int:
    """Remove the runtime directories of machines that are gone, and what killed benchmarks left; whatever runs is not touched."""
    from hmmnet.launcher.directory import remove_stale
    from hmmnet.launcher.scratch import remove_left

    removed = [*remove_stale(), *remove_left()]
    if as_json:
        import json

        print(json.dumps(removed))
    else:
        print(f"removed: {', '.join(removed)}" if removed else "nothing to remove")
    return 0
