"""What no recording shows: operations, options and combinations of the trace syntax, with answers that were derived from Linux's source.

`derived.traces` has the form of a recording and is none. Each script says in its comment which rule it is about; the answers were read out
of Linux 6.12 (mm/gup.c, mm/madvise.c, mm/mlock.c, mm/mremap.c, mm/vmscan.c, mm/rmap.c, mm/memory.c, mm/khugepaged.c, mm/hugetlb.c,
lib/test_hmm.c, mm/gup_test.c) and hold in both orders, like those of the recordings.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hmmnet.play.grammar import ADVICE, PROTECTIONS, SYNTAX_OPERATIONS
from hmmnet.play.script import read_scripts
from tests.conformance.test_recordings import RECORDINGS, complaint, played

DERIVED = Path(__file__).parent / "derived.traces"
SCRIPTS = 44


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_derived_answers_are_given(*, backwards: bool) -> None:
    """Every line of every script."""
    scripts = read_scripts(DERIVED)
    tally = played(scripts[::-1] if backwards else scripts, "sim", seed=int(backwards))
    assert tally.identical == SCRIPTS, complaint(tally)


def test_every_word_of_the_syntax_is_played_by_some_script() -> None:
    """Operations, protections and advice: all are in a recording or in a derived script, but for what says nothing about memory."""
    words = {
        word
        for path in (DERIVED, *RECORDINGS.glob("*.traces"))
        for script in read_scripts(path)
        for operation in script.operations
        for word in operation.words
    }
    wanted = {*SYNTAX_OPERATIONS, *ADVICE, *PROTECTIONS, "shared", "hugetlb", "thp", "populate", "dontunmap", "fast"}
    assert wanted - words == {"MERGEABLE", "UNMERGEABLE", "HUGEPAGE", "NOHUGEPAGE"}
