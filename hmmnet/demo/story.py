"""The sentences of the demo: four questions that a newcomer asks of HMM, each answered where its answer can be seen in the run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question, and its answer in a sentence or two."""

    asked: str
    answer: str


MIRRORING = Question(
    "What does mirroring give the device?",
    "The process's own addresses. The GPU follows the pointers that the CPU stored; nothing is copied or registered beforehand, what it has"
    " no entry for it faults on, and when the CPU's page table changes, the GPU's entry is gone before the change counts.",
)
MIGRATION = Question(
    "Why migrate, if every address works already?",
    "Distance. A page that stays in CPU memory is read over the link, and a page fetched on demand stops the job first. A program that"
    " knows what it will touch moves it in one piece, and the job then runs in the device's own memory.",
)
CPU_ACCESS = Question(
    "What must the CPU do to see device memory?",
    "Nothing: it loads the address. The page table says device-private, so the load faults, the driver sends the page home, and the load is"
    " repeated. (A coherent machine reads the device's memory in place.)",
)
DUMMY_DRIVER = Question(
    "Where is a dummy driver to start from?",
    "devices/models/dmirror.py: mirror, fault, migrate and little else. It does what the kernel's own lib/test_hmm.c does, and `hmmnet"
    " play` compares the two line by line.",
)
QUESTIONS = (MIRRORING, MIGRATION, CPU_ACCESS, DUMMY_DRIVER)
