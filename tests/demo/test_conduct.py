"""The demo's course: what ends it early."""

from __future__ import annotations

import tempfile
import threading

import pytest
import trio

from hmmnet.demo import conduct
from hmmnet.demo.answers import Answers, answers_for
from hmmnet.demo.conduct import Conductor, DemoTimeout
from hmmnet.demo.data import Input

TEXT = b"to be or not to be"


async def test_a_long_text_that_plain_python_reads_holds_up_nobody_who_wants_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the demo at once; the thread that reads goes with the process."""
    read = threading.Event()

    def slowly(text: bytes) -> Answers:
        read.wait(60)
        return answers_for(text)

    monkeypatch.setattr(conduct, "answers_for", slowly)
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        with trio.fail_after(30), trio.CancelScope() as scope:
            conductor = Conductor(Input(TEXT, "a text", 1), "two-gpus", 1, lambda _: None, lambda _: scope.cancel(), rate=1.0)
            await conductor.run()
        assert scope.cancelled_caught
    read.set()


async def test_a_demo_that_takes_too_long_says_what_may_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The links at that rate: nothing may be wrong."""
    monkeypatch.setattr(conduct, "SECONDS_MAX", 3.0)
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        conductor = Conductor(Input(TEXT, "a text", 1), "two-gpus", 1, lambda _: None, lambda _: None, rate=1e-7)
        with pytest.raises(
            DemoTimeout, match="no end after 3 s: the links of two-gpus are slow, at a rate of 1e-07; give it another --rate"
        ):
            await conductor.run()
