"""Where the pages that a job faults on shall live: the personalities of drivers, as pure planning.

A policy is asked once for each batch of faults and answers which page ranges to migrate; everything that faulted and did not migrate is
mapped where it is. `Launch.placement` names the policy: one of those here, one that an installed package offers (entry point group
``hmmnet.policies``), or one that this process registered (`hmmnet.plugins`).

What is named is a class or a function that makes a policy, called without arguments once for each context, so a policy may remember what
it saw; or a policy itself, which all contexts then share. A policy is somebody else's code: what it answers is checked before anything
moves (`Planned`), and a wrong answer ends the jobs that wait for it, with the policy named, and nothing else.
"""

from __future__ import annotations

import logging
from operator import index
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hmmnet.errors import HmmnetError
from hmmnet.pages import PAGE_SIZE, PAGES_MAX, Words
from hmmnet.plugins import POLICIES, load, names

BUILT_IN = {
    "demand": "hmmnet.devices.policy.demand:Demand",
    "demand-2m": "hmmnet.devices.policy.demand:DemandHuge",
    "remote": "hmmnet.devices.policy.remote:Remote",
}

PLAN_PAGES_MAX = 1 << 27
"""Pages that one plan may move: the largest granularity that a driver offers (amdkfd's, 2^27). A plan without bounds would never end."""


log = logging.getLogger("hmmnet.devices")


class Policy(Protocol):
    """Plans one service pass.

    A policy that is of use only where the device's page table maps pages of one size says so in a field ``page_bytes``: a device without
    them in its ``page_sizes`` refuses it at launch.
    """

    def ranges(self, pages: Words, write: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
        """Page ranges [start, end) to migrate for the faults on `pages` (ascending, each once); ascending and apart.

        `write` says for each page whether it is to be written. Ranges may be larger than what faulted, hold pages that nothing is mapped
        at, and leave faulted pages out. The answer depends on nothing but these arguments and what the policy was asked before.
        """
        ...


class BadPlan(HmmnetError):
    """A policy failed, or answered what is no plan: a bug of whoever wrote it."""


class Planned:
    """A policy whose answers are looked at. Its own exceptions become `BadPlan`, too."""

    def __init__(self, name: str, policy: Policy) -> None:
        self.name = name
        self.page_bytes: int = getattr(policy, "page_bytes", PAGE_SIZE)
        self._policy = policy

    def ranges(self, pages: Words, write: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
        """See `Policy.ranges`. Raises BadPlan."""
        try:
            answer = [(index(start), index(end)) for start, end in self._policy.ranges(pages, write)]
        except Exception as error:
            log.exception('policy "%s" failed', self.name)  # whoever waits hears what, not where
            shown = ", ".join(f"0x{page:x}" for page in pages[:4].tolist()) + (", ..." if len(pages) > 4 else "")
            raise BadPlan(f'policy "{self.name}" failed on the faults of pages {shown}: {error!r}') from error
        behind = 0
        for start, end in answer:
            if not behind <= start < end <= PAGES_MAX:
                raise BadPlan(
                    f'policy "{self.name}" answered pages [0x{start:x}, 0x{end:x}) behind 0x{behind:x}: '
                    "ranges must not be empty, must be ascending and apart, and lie inside the address space"
                )
            behind = end
        if (wanted := sum(end - start for start, end in answer)) > PLAN_PAGES_MAX:
            raise BadPlan(f'policy "{self.name}" wants to move {wanted} pages in one pass; at most {PLAN_PAGES_MAX} are carried out')
        return answer


def make_policy(name: str) -> Planned | None:
    """The policy called `name`, made for one context; None when there is none. Raises BadPlan for something that is no policy."""
    found: Any = load(POLICIES, name, BUILT_IN)
    if found is None:
        return None
    if isinstance(found, type) or not hasattr(found, "ranges"):
        try:
            found = found()
        except Exception as error:
            raise BadPlan(f'policy "{name}" cannot be made: {error!r}') from error
    if not callable(getattr(found, "ranges", None)):
        raise BadPlan(f'policy "{name}" is a {type(found).__name__} without a method "ranges"; see hmmnet.devices.policy.Policy')
    if type(getattr(found, "page_bytes", PAGE_SIZE)) is not int:
        raise BadPlan(f'policy "{name}" has a page_bytes of {found.page_bytes!r}; a whole number is wanted')
    return Planned(name, found)


def policy_names() -> list[str]:
    """Every policy that there is, those of plugins too."""
    return names(POLICIES, BUILT_IN)
