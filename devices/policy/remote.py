"""Never migrate: system memory is read and written over the link, where it is.

What a program asks for with "accessed by" advice, and what a coherent link makes cheap. Pages that live on the device already stay there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmmnet.pages import Words


class Remote:
    """Map everything where it is."""

    def ranges(self, pages: Words, write: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:  # noqa: ARG002 - see Policy
        """See `Policy.ranges`."""
        return []
