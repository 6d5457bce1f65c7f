"""Where the pages that a job faults on shall live: the personalities of drivers, as pure planning.

A policy is asked once for each batch of faults and answers which page ranges to migrate; everything that faulted and did not migrate is
mapped where it is. `Launch.placement` names the policy.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from hmmnet.pages import Words

from .demand import Demand
from .remote import Remote


class Policy(Protocol):
    """Plans one service pass."""

    def ranges(self, pages: Words, write: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
        """Page ranges [start, end) to migrate for the faults on `pages` (ascending, each once); ascending and apart."""
        ...


POLICIES: dict[str, Policy] = {"demand": Demand(), "remote": Remote()}
"""By the name that `Launch.placement` gives."""
