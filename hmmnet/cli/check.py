"""``hmmnet check``: whether the invariants of a running machine hold."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .completion import machines


def check(
    name: Annotated[
        str | None,
        typer.Argument(autocompletion=machines, help='The machine; not needed when only one runs, or for "default".', show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print for programs: complaints, and what was looked at.")] = False,
) -> int:
    """Look at a running machine: page tables and frames, what the IOMMU lets through, and the mirror of every device.

    Exit code 1 when an invariant is broken, or a device did not tell what its mirror holds.
    """
    from hmmnet.client import attach

    with attach(name) as machine:
        found = machine.check()
    if as_json:
        import json

        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 1 if found["complaints"] or found["unseen"] else 0


def show(found: dict[str, Any]) -> None:
    """Print it for a person."""
    looked = (
        f"{found['processes']:,} processes with {found['pages']:,} pages, {found['mirrors']:,} mirrors with "
        f"{found['translations']:,} translations"
    )
    for complaint in found["complaints"]:
        print(f"WRONG  {complaint}")
    for device, why in found["unseen"].items():
        print(f"UNSEEN {device} did not tell what its mirror holds: {why}")
    if not found["complaints"]:
        print(f"RIGHT  the invariants hold: {looked}")
    else:
        print(f"looked at {looked}")
