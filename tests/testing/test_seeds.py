"""Seeds: each a test of its own; exactly one, or another number of them, from the command line."""

from __future__ import annotations

import pytest

from .suites import run, write

SUITE = """
    import pytest

    SEEN = []

    @pytest.mark.seeds(3)
    def test_number(hmmnet_seed):
        SEEN.append(hmmnet_seed)

    @pytest.mark.seeds(range(7, 9))
    @pytest.mark.parametrize("size", [1, 2])
    def test_range(simulate, size):
        async def main(machine):
            assert machine.device_names
        assert simulate(main).seed == simulate.seed

    @pytest.mark.seeds([11, 5])
    class TestClass:
        def test_list(self, hmmnet_seed):
            pass

        def test_without(self):
            pass

    def test_unmarked(hmmnet_seed):
        SEEN.append(hmmnet_seed)
    """


def ids(result: pytest.RunResult) -> list[str]:
    """Which tests ran, in order."""
    return [line.split(" ")[0].split("::", 1)[1] for line in result.outlines if " PASSED" in line]


def test_each_seed_is_a_test(pytester: pytest.Pytester) -> None:
    """Numbers, ranges and lists, on functions and classes; a test of the class that has no use for seeds runs once."""
    write(pytester, SUITE)
    assert ids(run(pytester, "-v")) == [
        "test_number[seed0]",
        "test_number[seed1]",
        "test_number[seed2]",
        *(f"test_range[{size}-seed{seed}]" for size in (1, 2) for seed in (7, 8)),
        "TestClass::test_list[seed11]",
        "TestClass::test_list[seed5]",
        "TestClass::test_without",
        "test_unmarked",
    ]


def test_exactly_one_seed(pytester: pytest.Pytester) -> None:
    """--hmmnet-seed is for every test that has one, marked or not, and need not be in the marker."""
    write(pytester, SUITE + "\n        assert hmmnet_seed == 17\n")
    ran = ids(run(pytester, "-v", "--hmmnet-seed", "17"))
    assert ran == [
        "test_number[seed17]",
        "test_range[1-seed17]",
        "test_range[2-seed17]",
        "TestClass::test_list[seed17]",
        "TestClass::test_without",
        "test_unmarked",
    ]


def test_as_many_seeds_as_the_night_is_long(pytester: pytest.Pytester) -> None:
    """--hmmnet-seeds replaces what markers say; a single seed goes before it."""
    write(pytester, SUITE)
    assert len(ids(run(pytester, "-v", "--hmmnet-seeds", "5"))) == 5 + 10 + 5 + 2
    assert len(ids(run(pytester, "-v", "--hmmnet-seeds", "5", "--hmmnet-seed", "3"))) == 6


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--hmmnet-seed", "x"], "*--hmmnet-seed x: a seed is a whole number from 0 on"),
        (["--hmmnet-seed", "-3"], "*--hmmnet-seed -3: a seed is a whole number from 0 on"),
        (["--hmmnet-seeds", "0"], "*--hmmnet-seeds 0: a number of seeds is wanted, such as 100"),
        (["--hmmnet-seeds", "many"], "*--hmmnet-seeds many: a number of seeds is wanted, such as 100"),
        (["-o", "hmmnet_timeout=soon"], "*hmmnet_timeout = soon: a positive number of seconds is wanted"),
        (["-o", "hmmnet_timeout=-1"], "*hmmnet_timeout = -1: a positive number of seconds is wanted"),
        (["-o", "hmmnet_story=all"], "*hmmnet_story = all: a number of lines is wanted"),
    ],
)
def test_options_that_are_none(pytester: pytest.Pytester, arguments: list[str], complaint: str) -> None:
    """One line, and nothing runs."""
    write(pytester, SUITE)
    result = run(pytester, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([complaint])
    assert "Traceback" not in result.stderr.str() + result.stdout.str()


def test_help_and_markers(pytester: pytest.Pytester) -> None:
    """Everything is where pytest users look."""
    shown = run(pytester, "--help").stdout.str()
    for word in (
        "--hmmnet-seed=N",
        "--hmmnet-seeds=N",
        "--hmmnet-strict",
        "hmmnet_topology",
        "hmmnet_strict",
        "hmmnet_timeout",
        "hmmnet_story",
    ):
        assert word in shown, word
    run(pytester, "--markers").stdout.fnmatch_lines(
        [f"@pytest.mark.{name}(*" for name in ("topology", "faults", "seeds", "strict_migrations")]
    )
    fixtures = run(pytester, "--fixtures").stdout.str()
    for name in ("hmmnet_seed", "machine", "simulated_machine", "simulate", "migrations"):
        assert f"\n{name} -- " in fixtures, name
