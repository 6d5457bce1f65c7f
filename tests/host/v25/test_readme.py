"""The driver that host/README.md works out is what a reader copies: it runs as it stands there, and does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hmmnet

README = Path(__file__).parents[3] / "host" / "README.md"


def example() -> str:
    """The example's text."""
    (block,) = re.findall(r"```python\n(.+?)```", README.read_text(), flags=re.DOTALL)
    assert isinstance(block, str)
    return block


def test_the_example_of_the_readme_runs() -> None:
    """As a script, with the numbers that its comments name; the program reads what it wrote."""
    done = subprocess.run([sys.executable, "-c", example()], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (shown,) = re.findall(r"# (\(.+\))\n$", example())
    assert done.stdout.strip() == shown
    names: dict[str, Any] = {}
    exec(example().rpartition("\nprint(")[0], names)
    *_, data = hmmnet.simulate(names["main"], personality="v25").value
    assert data == (b"pages " * 1000)[:6000]
