"""The report of a failed test ends with what happened, and with the command that shows it again."""

from __future__ import annotations

import os
import re
import shlex

import numpy as np
import pytest

from hmmnet.observe.events import DeviceChanged, Invalidated, Moved, Refused
from hmmnet.testing.story import Story, told_fault

from .suites import run, write

SUITE = """
    import pytest

    @pytest.mark.seeds(range(3, 6))
    @pytest.mark.faults(loss=0.1)
    @pytest.mark.parametrize("device", ["gpu0", "gpu1"])
    def test_two(simulated_machine, device, hmmnet_seed):
        process = simulated_machine.process()
        address = process.mmap(16 * 4096, address=1 << 32)
        process.write(address, bytes(16 * 4096))
        process.migrate(address, 2 * 4096, device)
        process.load(address)
        simulated_machine.kill_device(device)
        assert (hmmnet_seed, device) != (4, "gpu1")

    class TestOne:
        @pytest.mark.seeds(5)
        def test_one(self, hmmnet_seed):
            assert hmmnet_seed != 2

    def test_plain(simulated_machine):
        assert 0

    def test_not_ours():
        assert 0
    """


def commands(result: pytest.RunResult) -> list[str]:
    """The commands that failed tests end with."""
    return [result.outlines[i + 1] for i, line in enumerate(result.outlines) if "hmmnet: see it again" in line]


def test_a_failed_test_ends_with_story_and_command(pytester: pytest.Pytester) -> None:
    """Faults, migrations, invalidations and losses with their virtual time; the command fails as the test did. Others are left alone."""
    write(pytester, SUITE)
    result = run(pytester)
    result.assert_outcomes(passed=9, failed=4)
    result.stdout.fnmatch_lines(
        [
            "*_ test_two[[]gpu1-seed4[]] _*",
            "*hmmnet: what happened*",
            "* ms  fault: a * message * gpu*: the message is gone (loss)*",
            "* ms  process 1000: pages 0x100000-0x100001 (2): host -> gpu1 (asked for by a program)",
            "* ms  process 1000: page 0x100000: gpu1 -> host (an access of the CPU)",
            '* ms  gpu1 is lost: device "gpu1" was killed',
            "*hmmnet: see it again*",
            "pytest 'test_mine.py::test_two[[]gpu1-seed4[]]' --hmmnet-seed 4",
        ]
    )
    said = commands(result)
    assert said == [
        "pytest 'test_mine.py::test_two[gpu1-seed4]' --hmmnet-seed 4",
        "pytest test_mine.py::TestOne::test_one --hmmnet-seed 2",
        "pytest test_mine.py::test_plain --hmmnet-seed 0",
    ]
    story = told(result, "test_two")
    assert len(story) > 3
    for command in said[:2]:
        again = run(pytester, *shlex.split(command)[1:])
        again.assert_outcomes(failed=1)
        assert commands(again) == [command]
    again = run(pytester, *shlex.split(said[0])[1:])
    assert told(again, "test_two") == story


def test_an_answer_is_shown_where_it_was_asked_for(pytester: pytest.Pytester) -> None:
    """The error is the machine's, the mistake is in the test: no line of ours, but with --full-trace; a bug of ours is seen whole. A marker
    that is wrong is told once.
    """
    write(
        pytester,
        """
        import pytest

        def ask(process):
            process.launch("vector_ad", "gpu0")

        def test_blocking(simulated_machine):
            ask(simulated_machine.process())

        async def test_awaited(simulated_machine):
            await (await simulated_machine.process()).launch("vector_ad", "gpu0")

        def test_crash(simulated_machine, monkeypatch):
            monkeypatch.setattr("hmmnet.blocking.BlockingProcess.load", lambda process, address: process._loop.ask(None))
            simulated_machine.process().load(0)
        """,
    )
    short = run(pytester)
    short.assert_outcomes(failed=3)
    short.stdout.fnmatch_lines(["test_mine.py:*: KernelError", "*hmmnet: see it again*"])
    text = short.stdout.str()
    before, _, crash = text.partition("test_crash")
    assert 'process.launch("vector_ad", "gpu0")' in before
    assert "session.py" not in before
    assert "frozen.py" not in before
    assert "frozen.py" in crash
    assert "session.py" in run(pytester, "--full-trace").stdout.str()
    write(pytester, "import pytest\n@pytest.mark.topology('nvlnk-8')\ndef test_one(simulated_machine): pass\n")
    told_of, _, _ = run(pytester).stdout.str().partition("short test summary")  # which repeats it where CI is set
    assert told_of.count('nvlnk-8: no preset and no file has this name; did you mean "nvlink-8"?') == 1
    assert "another exception" not in told_of


def told(result: pytest.RunResult, test: str) -> list[str]:
    """The story of a failed test."""
    first = next(i for i, line in enumerate(result.outlines) if f" {test}" in line and line.startswith("_"))
    begin = next(i for i in range(first, len(result.outlines)) if "hmmnet: what happened" in result.outlines[i])
    end = next(i for i in range(begin, len(result.outlines)) if "hmmnet: see it again" in result.outlines[i])
    return result.outlines[begin + 1 : end]


def test_from_another_folder(pytester: pytest.Pytester) -> None:
    """The command names the file as seen from where pytest was started."""
    (pytester.path / "inside").mkdir()
    write(pytester, SUITE, "inside/test_mine.py")
    pytester.chdir()
    result = run(pytester, "inside", "-k", "test_plain")
    assert commands(result) == ["pytest inside/test_mine.py::test_plain --hmmnet-seed 0"]


def test_as_long_as_wanted(pytester: pytest.Pytester) -> None:
    """hmmnet_story is the number of events; 0 is none; what came before is counted."""
    write(pytester, SUITE)
    short = told(run(pytester, "-o", "hmmnet_story=2", "-k", "gpu1-seed4"), "test_two")
    assert len(short) == 3
    assert short[0].strip().startswith("...")
    assert short[0].endswith("events before")
    assert "is lost" in short[-1]
    none = run(pytester, "-o", "hmmnet_story=0", "-k", "gpu1-seed4")
    assert "what happened" not in none.stdout.str()
    assert commands(none)


def test_a_machine_that_does_not_start(pytester: pytest.Pytester) -> None:
    """Errors at setup end the same way."""
    text = """
    import hmmnet.plugins
    import pytest

    @pytest.mark.seeds([6])
    def test_it(simulated_machine):
        pass

    @pytest.fixture(autouse=True)
    def broken():
        def gpu(*arguments):
            raise ZeroDivisionError("no such GPU")
        with hmmnet.plugins.offered("hmmnet.devices", "gpu", gpu):
            yield
    """
    write(pytester, text)
    result = run(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["E*no such GPU*", "pytest test_mine.py::test_it --hmmnet-seed 6"])


def test_words() -> None:
    """Every kind of event; what is alike in a row is one line; what is old is counted."""
    story = Story()
    pages = np.array([1, 2, 3, 9], np.uint64)
    scattered = np.arange(0, 40, 2, dtype=np.uint64)
    story.hear(Moved(0.0, 7, pages, "gpu0", "host", "release"))
    story.hear(Moved(0.001, 7, scattered, "host", "gpu1", "fault"))
    story.hear(Moved(0.0015, 7, scattered[:-1], "host", "gpu1", "fault"))  # other pages, though the words begin alike
    for at_s in (0.002, 0.003, 0.004):
        story.hear(Invalidated(at_s, 7, 1, 3, "unmap", 2))
    story.hear(Invalidated(0.005, 7, 1, 2, "migrate", 1))
    story.hear(Refused(0.006, "gpu0", "page 0x1"))
    story.hear(DeviceChanged(0.007, "gpu0", "lost", "was killed"))
    story.hear(DeviceChanged(0.008, "gpu0", "ready"))
    story.fault(0.009, "fault loss gpu0 control in")
    story.fault(0.010, "fault crash migrate.before_copy device=gpu0")
    story.note(0.011, "mine")
    assert story.shown(20) == [
        "   0.000000 ms  process 7: pages 0x1-0x3, 0x9 (4): gpu0 -> host (gpu0 gave its memory up)",
        "   1.000000 ms  process 7: pages 0x0, 0x2, 0x4, 0x6 and 16 ranges more (20): host -> gpu1 (a fault of gpu1)",
        "   1.500000 ms  process 7: pages 0x0, 0x2, 0x4, 0x6 and 15 ranges more (19): host -> gpu1 (a fault of gpu1)",
        "   2.000000 ms  process 7: pages 0x1-0x2 (2): 2 mirrors told to drop it (unmap) (and 2 times more like it)",
        "   5.000000 ms  process 7: page 0x1: 1 mirror told to drop it (migrate)",
        "   6.000000 ms  gpu0 was refused an access: page 0x1",
        "   7.000000 ms  gpu0 is lost: was killed",
        "   8.000000 ms  gpu0 is ready",
        "   9.000000 ms  fault: a control message to gpu0: the message is gone (loss)",
        "  10.000000 ms  fault: crash migrate.before_copy device=gpu0",
        "  11.000000 ms  mine",
    ]
    assert story.shown(2)[0] == "           ...  9 events before"
    assert len(story.shown(2)) == 3
    assert story.shown(0) == []


def moves(story: Story, pages: range, marked: tuple[int, ...]) -> None:
    """One page after the other moves, a millisecond each."""
    for page in pages:
        story.hear(Moved(page / 1e3, 7, np.array([page], np.uint64), "host", "gpu0", "user"), marked=page in marked)


def test_around_what_must_not_be() -> None:
    """The first that is marked is shown with what was before and after it, however long ago; further ones are, too."""
    story = Story()
    moves(story, range(3000), (1500, 1502, 1700))
    shown = story.shown(10, marked=True)
    assert [line.split("process")[0].split("ms")[0].strip() for line in shown if " ms " in line] == [
        *(f"{page}.000000" for page in range(1495, 1503)),
        "1700.000000",
    ]
    assert shown[0] == "           ...  1,495 events before"
    assert shown[6] == "1500.000000 ms  NOT ALLOWED: process 7: page 0x5dc: host -> gpu0 (asked for by a program)"
    assert shown[9] == "           ...  197 events between"
    assert shown[-1] == "           ...  1,299 events after"
    assert story.shown(2)[-1].startswith("2999.000000 ms"), "when the test failed for another reason, its end is shown"
    assert len(story.shown(1, marked=True)) == 3
    assert story.shown(0, marked=True) == []
    few = Story()
    moves(few, range(2), (0,))
    assert few.shown(10, marked=True) == few.shown(10)
    many = Story()
    moves(many, range(100), tuple(range(100)))
    assert len([line for line in many.shown(10, marked=True) if " ms " in line]) <= 10


LOSING = """
    import pytest

    @pytest.mark.faults(loss={"on": "gpu0", "probability": 0.2})
    def test_lossy(machine):
        machine.add_fault("point.delay", on="*", point="migrate.before_copy", latency="10us")
        process = machine.process()
        address = process.malloc(4096)
        process.write(address, bytes(4096))
        for _ in range(4):
            process.migrate(address, 4096, "gpu0")
            process.load(address)
        assert 0
    """


def test_every_kind_of_fault_is_in_the_story(pytester: pytest.Pytester) -> None:
    """Also those that happen at no point and to no message: when they begin, and when they are over."""
    write(
        pytester,
        """
        import pytest

        @pytest.mark.faults({"kind": "process.munmap", "point": "migrate.after", "nth": 1}, {"kind": "link.down", "on": "node0-gpu0"})
        def test_it(simulated_machine):
            process = simulated_machine.process()
            number = simulated_machine.add_fault("clock.jump", on="gpu1")
            simulated_machine.sleep(1)
            simulated_machine.remove_fault(number)
            simulated_machine.add_fault("page.retire", on="gpu1")
            assert 0
        """,
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "* 0.000000 ms  fault 1 begins: process.munmap * point=migrate.after",
            "* 0.000000 ms  fault 2 begins: link.down node0-gpu0",
            "* ms  fault 3 begins: clock.jump gpu1 by=1",
            "*1000.* ms  fault 3 is over",
            "*1000.* ms  fault 4 begins: page.retire gpu1*",
        ]
    )


def test_a_fault_that_outlives_its_machine_is_not_over_in_the_story(pytester: pytest.Pytester) -> None:
    """What the end of a machine ends is told nowhere, in whichever form the test has one."""
    write(
        pytester,
        """
        async def test_awaiting(simulated_machine):
            simulated_machine.remove_fault(simulated_machine.add_fault("clock.jump", on="gpu1"))
            simulated_machine.add_fault("clock.jump", on="gpu1")
            assert 0

        def test_simulating(simulate):
            async def main(machine):
                machine.remove_fault(machine.add_fault("clock.jump", on="gpu1"))
                machine.add_fault("clock.jump", on="gpu1")
                assert 0

            simulate(main)
        """,
    )
    result = run(pytester)
    result.assert_outcomes(failed=2)
    for test in ("test_awaiting", "test_simulating"):
        lines = [line for line in told(result, test) if "fault " in line]
        assert [line.split("ms", 1)[1].strip() for line in lines] == [
            "fault 1 begins: clock.jump gpu1 by=1",
            "fault 1 is over",
            "fault 2 begins: clock.jump gpu1 by=1",
        ]


def test_a_delay_at_a_point_is_no_message() -> None:
    """Even where it tells as many words as one about a message has."""
    assert told_fault("fault delay migrate.mid_copy node=host pages=1") == "fault: delay migrate.mid_copy node=host pages=1"
    assert "a control message to gpu0" in told_fault("fault delay gpu0 control in")


def test_faults_of_real_machines_are_in_the_story(pytester: pytest.Pytester) -> None:
    """Lost messages, what happened at the host's points, and which faults began, as on simulated machines."""
    write(pytester, LOSING)
    result = run(pytester, "-o", "hmmnet_story=1000")
    result.assert_outcomes(failed=1)
    story = told(result, "test_lossy")
    assert any("fault 1 begins: loss gpu0" in line for line in story), story
    assert any("the message is gone (loss)" in line for line in story), story
    assert any(
        re.search(r"fault: delay migrate.before_copy node=host device=gpu0 process=1000 start=0x[0-9a-f]+ pages=1", line) for line in story
    ), story


def test_the_command_repeats_what_the_command_line_said(pytester: pytest.Pytester) -> None:
    """Settings of hmmnet's, without which the test might pass; no others."""
    write(pytester, SUITE)
    given = ["--hmmnet-strict", "-o", "hmmnet_story=2", "-o", "console_output_style=count"]
    said = commands(run(pytester, "-k", "plain", *given))
    assert said == ["pytest test_mine.py::test_plain --hmmnet-seed 0 --hmmnet-strict -o hmmnet_story=2"]


BUGGY = """
    class Buggy:
        def ranges(self, pages, write):
            size = len(pages) - len(write)
            return [(int(pages[0]), int(pages[0]) // size)]
    """
DRIVEN = """
    import pytest

    def test_asynchronously(machine):
        machine.create_process()
        process = machine.process()
        address = process.malloc(4096)
        process.write(address, bytes(4096))
        process.launch("reduction", "gpu1", "buggy", a=address, n=8, dtype="<u8")

    async def test_under_trio(machine):
        process = await machine.process()
        address = await process.malloc(4096)
        await process.write(address, bytes(4096))
        await process.launch("reduction", "gpu1", "buggy", a=address, n=8, dtype="<u8")

    def test_of_which_nothing_crashes(machine):
        assert 0
    """


def test_a_drivers_bug_in_a_devices_process_is_in_the_report(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which device, what it raised and where: the test itself sees no more than that a job failed."""
    write(pytester, BUGGY, "buggy_policy.py")
    about = pytester.mkdir("buggy-1.dist-info")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: buggy\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[hmmnet.policies]\nbuggy = buggy_policy:Buggy\n")
    monkeypatch.setenv("PYTHONPATH", f"{pytester.path}:{os.environ.get('PYTHONPATH', '')}")
    write(pytester, DRIVEN)
    result = run(pytester, beside=())
    result.assert_outcomes(failed=3)
    sections = [result.outlines[i + 1] for i, line in enumerate(result.outlines) if "hmmnet: what crashed in devices" in line]
    assert len(sections) == 2, "\n".join(result.outlines)
    for told in sections:
        assert told.startswith("gpu1: ")
        assert "buggy_policy.py" in told
        assert told.endswith("return [(int(pages[0]), int(pages[0]) // size)] | ZeroDivisionError: integer division or modulo by zero")
