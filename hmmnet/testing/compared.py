"""Long data compared by those who check: a failure names the first place.

``assert left == right`` says the same of a few bytes. Of a megabyte pytest makes a difference line by line, where it explains in full, as
it does under CI: that takes minutes, or until somebody ends the run, and then nobody is told what was wrong.
"""

from __future__ import annotations

import numpy as np

from hmmnet.pages import Words


def same(found: Words | bytes, expected: Words | bytes, what: str = "") -> None:
    """Raises AssertionError unless both are the same: in words or bytes, whichever both are. `what` is what the error begins with."""
    left, right = (np.frombuffer(one, np.uint8) if isinstance(one, bytes) else one for one in (found, expected))
    assert left.dtype == right.dtype, f"{what}{left.dtype} where {right.dtype} is wanted"
    unit = "byte" if isinstance(found, bytes) else "word"
    assert len(left) == len(right), f"{what}{len(left)} {unit}s where {len(right)} are wanted"
    wrong = np.flatnonzero(left != right)
    if len(wrong):
        at = int(wrong[0])
        raise AssertionError(f"{what}{unit} {at} is 0x{int(left[at]):x} and not 0x{int(right[at]):x}; {len(wrong)} of {len(left)} differ")
