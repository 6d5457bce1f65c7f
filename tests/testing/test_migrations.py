"""Strict mode: what moves without having been declared fails the test, with page, direction and cause."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hmmnet.errors import HmmnetError
from hmmnet.observe.events import DeviceChanged, Moved
from hmmnet.testing import Migrations

from .suites import run, write

PAGE = 4096


def moved(*pages: int, source: str = "host", target: str = "gpu0", cause: str = "fault", process: int = 1000) -> Moved:
    return Moved(0.001, process, np.array(pages, np.uint64), source, target, cause)


@pytest.mark.parametrize(
    ("allowance", "left"),
    [
        ({}, []),
        ({"address": 16 * PAGE, "length": PAGE}, [17, 18]),
        ({"address": 17 * PAGE - 1, "length": 2}, [18]),
        ({"to": "gpu0"}, []),
        ({"to": "gpu1"}, [16, 17, 18]),
        ({"to": "gpu*", "source": "host"}, []),
        ({"source": "gpu1"}, [16, 17, 18]),
        ({"cause": "fault"}, []),
        ({"cause": "cpu fault"}, [16, 17, 18]),
        ({"process": 1000}, []),
        ({"process": 1001}, [16, 17, 18]),
    ],
)
def test_what_an_allowance_covers(allowance: dict[str, Any], left: list[int]) -> None:
    """Addresses, both ends, cause and process; what it leaves out is free."""
    migrations = Migrations(strict=True)
    migrations.allow(**allowance)
    migrations.hear(moved(16, 17, 18))
    assert [page for _, pages in migrations.unexpected for page in pages.tolist()] == left
    assert bool(migrations.complaint()) is bool(left)


def test_allowances_add_up_and_end_with_their_block() -> None:
    """Two halves allow the whole; behind the block the same is unexpected; without strict mode nothing is."""
    migrations = Migrations(strict=True)
    migrations.allow(16 * PAGE, PAGE)
    with migrations.allowed(17 * PAGE, PAGE, to="gpu0"):
        migrations.hear(moved(16, 17))
    assert migrations.complaint() == ""
    migrations.hear(moved(16, 17))
    migrations.hear(moved(3, source="gpu0", target="host", cause="cpu fault"))
    migrations.hear(DeviceChanged(0.0, "gpu0", "ready"))
    assert migrations.complaint().splitlines() == [
        "2 pages moved that nothing allowed to (strict):",
        '  process 1000: page 0x11: host -> gpu0 (a fault of gpu0; cause "fault") at 1.000000 ms',
        '  process 1000: page 0x3: gpu0 -> host (an access of the CPU; cause "cpu fault") at 1.000000 ms',
        "say what may move: migrations.allow(ADDRESS, LENGTH, to=...), or with migrations.allowed(...)",
    ]
    assert migrations.pages(to="gpu0") == 4
    assert migrations.pages(cause="cpu fault") == 1
    lenient = Migrations()
    lenient.hear(moved(1))
    assert lenient.complaint() == ""
    assert lenient.pages() == 1


def test_a_storm_is_told_in_a_few_lines() -> None:
    """The first eight, and how many more."""
    migrations = Migrations(strict=True)
    for page in range(20):
        migrations.hear(moved(page))
    lines = migrations.complaint().splitlines()
    assert lines[0] == "20 pages moved that nothing allowed to (strict):"
    assert lines[-2] == "  and 12 migrations more"
    assert len(lines) == 11


def test_allowances_that_are_none() -> None:
    """Nothing is allowed by mistake."""
    with pytest.raises(HmmnetError, match="of 0 bytes"):
        Migrations().allow(4096)
    with pytest.raises(HmmnetError, match='because of "magic"; there are cpu fault, fault, prefetch'):
        Migrations().allow(cause="magic")


SUITE = """
    import pytest

    def prepare(machine):
        process = machine.process()
        address = process.mmap(64 * 4096, address=1 << 32)
        process.write(address, bytes(64 * 4096))
        return process, address

    def test_fails(simulated_machine):
        process, address = prepare(simulated_machine)
        process.launch("reduction", "gpu0", a=address, n=512)

    def test_passes(simulated_machine, migrations):
        process, address = prepare(simulated_machine)
        migrations.allow(address, 16 * 4096, to="gpu0", process=process)
        process.launch("reduction", "gpu0", a=address, n=512)
        with migrations.allowed(address, 4096, to="host", cause="cpu fault"):
            process.load(address)
        assert migrations.pages(to="gpu0") == 16

    def test_real(machine, migrations):
        process, address = prepare(machine)
        process.migrate(address, 4096, "gpu1")
        assert migrations.pages() == 1

    async def test_awaited(simulated_machine):
        process = await simulated_machine.create_process()
        await process.migrate(await process.malloc(4096), 4096, "gpu1")

    def test_simulate(simulate):
        async def main(machine):
            process = await machine.create_process()
            await process.migrate(await process.malloc(4096), 4096, "gpu1")
        simulate(main)

    @pytest.mark.strict_migrations(False)
    def test_lenient(simulated_machine):
        process, address = prepare(simulated_machine)
        process.launch("reduction", "gpu0", a=address, n=512)

    def test_fails_for_another_reason(simulated_machine):
        process, address = prepare(simulated_machine)
        process.migrate(address, 4096, "gpu1")
        assert 0, "mine"
    """


@pytest.mark.parametrize("how", ["marker", "option", "setting"])
def test_strict_mode(pytester: pytest.Pytester, how: str) -> None:
    """On by marker, option or setting: in both worlds, blocking and awaited; a test's own failure goes before."""
    text = (
        SUITE.replace("import pytest\n", "import pytest\n    pytestmark = pytest.mark.strict_migrations\n", 1) if how == "marker" else SUITE
    )
    write(pytester, text, ini="hmmnet_strict = true\n" if how == "setting" else "")
    result = run(pytester, *(["--hmmnet-strict"] if how == "option" else []))
    result.assert_outcomes(passed=2, failed=5)
    result.stdout.fnmatch_lines(
        [
            "*_ test_fails _*",
            "16 pages moved that nothing allowed to (strict):",
            '  process 1000: pages 0x100000-0x10000f (16): host -> gpu0 (a fault of gpu0; cause "fault") at *',
            "*hmmnet: what happened*",
            "* ms  NOT ALLOWED: process 1000: pages 0x100000-0x10000f (16): host -> gpu0 (a fault of gpu0)",
            "*_ test_real _*",
            '  process 1000: page 0x100000: host -> gpu1 (asked for by a program; cause "prefetch") at *',
            "*_ test_awaited _*",
            "1 page moved that nothing allowed to (strict):",
            "*_ test_simulate _*",
            "1 page moved that nothing allowed to (strict):",
            "*_ test_fails_for_another_reason _*",
            "E*AssertionError: mine",
        ]
    )
    run(pytester, "-o", "hmmnet_strict=false", "-k", "not another").assert_outcomes(
        passed=2 if how == "marker" else 6, failed=4 if how == "marker" else 0, deselected=1
    )
