"""Markers: what they may say, and one line for what they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hmmnet.faults import Controls, MessageFault, Plan, Way
from hmmnet.faults.plan import named
from hmmnet.testing.marks import Mark, MarkMistake, read_faults, read_seeds, read_strict, read_topology
from hmmnet.topology.load import load

from .suites import run, write

PLAN = '[[fault]]\nkind = "loss"\nprobability = 0.25\n'


def mark(*arguments: Any, **named: Any) -> Mark:
    return Mark(arguments, named)


@pytest.mark.parametrize(
    ("given", "seeds"),
    [(3, [0, 1, 2]), (range(4, 6), [4, 5]), ([9, 2], [9, 2]), ((1,), [1]), ({5, 3}, [3, 5])],
)
def test_seeds(given: Any, seeds: list[int]) -> None:
    """A number, a range, a list, a tuple, a set."""
    assert read_seeds(mark(given)) == seeds


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (mark(), r"seeds\(\): one number, range or list"),
        (mark(1, 2), r"seeds\(1, 2\): one number"),
        (mark(count=3), r"seeds\(count=3\): one number"),
        (mark("20"), r"seeds\('20'\): a whole number, a range or a list"),
        (mark(True), "a whole number"),
        (mark(2.5), "a whole number"),
        (mark(0), "that are 0 seeds"),
        (mark(range(10**9)), "that are 1000000000 seeds; at least one and at most 100000"),
        (mark([1, "2"]), "'2' is no seed"),
        (mark([-1]), "-1 is no seed"),
        (mark([4, 4]), "named twice"),
    ],
)
def test_seeds_that_are_none(given: Mark, complaint: str) -> None:
    """Each with what was written."""
    with pytest.raises(MarkMistake, match=complaint):
        read_seeds(given)


def test_topologies(tmp_path: Path) -> None:
    """A preset, a file beside the test, a path, a Topology."""
    mine = load("two-gpus")
    (tmp_path / "mine.toml").write_text(Path("hmmnet/topology/presets/two-gpus.toml").read_text().replace('"two-gpus"', '"mine"'))
    assert read_topology(mark("nvlink-8"), tmp_path).device_names == tuple(f"gpu{i}" for i in range(8))
    for given in ("mine.toml", tmp_path / "mine.toml", Path("mine.toml")):
        assert read_topology(mark(given), tmp_path).device_names == mine.device_names
    assert read_topology(mark(mine), tmp_path) is mine


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (mark(), "one machine is wanted"),
        (mark("two-gpus", "nvlink-8"), "one machine is wanted"),
        (mark(8), r"topology\(8\): a preset's name, a TOML file or a Topology"),
        (mark("nvlnk-8"), r'topology\(\'nvlnk-8\'\): .*did you mean "nvlink-8"'),
        (mark("missing.toml"), r"topology\('missing.toml'\): missing.toml"),
        (mark("broken.toml"), r'broken.toml:2: .*bandwith: unknown key; did you mean "bandwidth"'),
    ],
)
def test_topologies_that_are_none(given: Mark, complaint: str, tmp_path: Path) -> None:
    """With the file and the line, where there are any."""
    (tmp_path / "broken.toml").write_text("[[link]]\nbandwith = '3 GB/s'\n")
    with pytest.raises(MarkMistake, match=complaint):
        read_topology(given, tmp_path)


def test_faults(tmp_path: Path) -> None:
    """Files, plans, dictionaries, kinds; several markers add up."""
    (tmp_path / "bad.toml").write_text(PLAN)
    quarter = MessageFault("loss", controls=Controls(0.25))
    slow = MessageFault("delay", Way("gpu0"), Controls(nth=2), latency_s=0.005)
    given = {"kind": "delay", "on": "gpu0<->host", "nth": 2, "latency": "5 ms"}
    plan = read_faults(
        [mark("bad.toml", Plan([slow])), mark(given, loss=0.25, duplicate={"times": 1}), mark(tmp_path / "bad.toml")], tmp_path
    )
    wanted = [quarter, slow, slow, quarter, MessageFault("duplicate", controls=Controls(times=1)), quarter]
    assert list(map(named, plan.faults)) == list(map(named, wanted))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (mark(), "says nothing"),
        (mark(3), "3 is no plan"),
        (mark("missing.toml"), "missing.toml: cannot be read: No such file"),
        (mark("garbage.toml"), r"faults\('garbage.toml'\): .*garbage.toml"),
        (mark("wrong.toml"), r"wrong.toml:2: fault 1: .*\"los\""),
        (mark(loss="often"), "loss is 'often': a probability or a dictionary is wanted, such as loss=0.05"),
        (mark(loss=True), "loss is True"),
        (mark(loss=1.5), "fault 1: probability: 1.5 is not between 0 and 1"),
        (mark(los=0.5), 'fault 1: kind: no fault is called "los"'),
        (mark(delay={"latancy": "5 ms"}), "fault 1: .*latancy"),
        (mark({"kind": "loss", "on": "gpu0<->gpu1"}), '"gpu0<->gpu1" is no way'),
        (mark({"kind": "loss", "times": [3]}), r"times: \[3\] where a whole number is wanted"),
    ],
)
def test_faults_that_are_none(given: Mark, complaint: str, tmp_path: Path) -> None:
    """With the marker, the file, the fault."""
    (tmp_path / "garbage.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "wrong.toml").write_text('[[fault]]\nkind = "los"\n')
    with pytest.raises(MarkMistake, match=complaint):
        read_faults([given], tmp_path)


def test_strict() -> None:
    """On by itself, or by its argument."""
    assert read_strict(mark())
    assert read_strict(mark(True))
    assert not read_strict(mark(False))
    assert not read_strict(mark(on=False))
    for wrong in (mark(1), mark(True, False), mark(yes=True), mark(True, on=True)):
        with pytest.raises(MarkMistake, match="True or False is wanted"):
            read_strict(wrong)


def test_mistakes_are_one_line_each(pytester: pytest.Pytester) -> None:
    """At collection, before anything runs; what only the test knows (marks on parameters, settings) when it is set up. No traceback."""
    for name, marker in {
        "topology": 'topology("nvlnk-8")',
        "faults": "faults(loss=7)",
        "seeds": 'seeds("20")',
        "useless": "seeds(20)",
        "harmless": "faults(loss=0.5)",
        "strict": "strict_migrations(3)",
        "misspelt": 'topology("nvlink-8")',
    }.items():
        arguments = "" if name in {"useless", "harmless", "misspelt"} else "simulated_machine"
        write(pytester, f"import pytest\n\n@pytest.mark.{marker}\ndef test_it({arguments}):\n    pass\n", f"test_{name}.py")
    parameter = """
    import pytest

    @pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.topology("nvlnk-8"))])
    def test_it(simulated_machine, x):
        pass
    """
    write(pytester, parameter, "test_parameter.py")
    result = run(pytester, "--continue-on-collection-errors")
    result.assert_outcomes(errors=8)
    lines = [line for line in result.outlines if line.startswith(("test_", "topology("))]
    wanted = [
        "test_faults.py::test_it: faults(loss=7): fault 1: probability: 7.0 is not between 0 and 1",
        "test_seeds.py::test_it: seeds('20'): a whole number, a range or a list of seeds is wanted, such as seeds(20)",
        "test_strict.py::test_it: strict_migrations(3): True or False is wanted, or nothing",
        "test_topology.py::test_it: topology('nvlnk-8'): *did you mean \"nvlink-8\"?*",
        "test_harmless.py::test_it: faults(...) on a test without a machine: ask for *",
        "test_misspelt.py::test_it: topology(...) on a test without a machine: ask for *",
        "test_useless.py::test_it: seeds(...) on a test without a seed: ask for *",
        "topology('nvlnk-8'): *did you mean*",
    ]
    result.stdout.fnmatch_lines_random(wanted)
    assert len(lines) >= len(wanted)
    assert "Traceback" not in result.stdout.str()
    assert "plugin.py" not in result.stdout.str()


def test_a_machine_may_be_asked_for_by_request(pytester: pytest.Pytester) -> None:
    """A fixture of both worlds gets its machine by name: the faults of its tests are on that."""
    write(
        pytester,
        """
        import pytest

        @pytest.fixture(params=["simulated_machine"])
        def world(request):
            return request.getfixturevalue(request.param)

        @pytest.mark.faults({"kind": "alloc.device", "nth": 1, "on": "gpu0"})
        def test_it(world):
            assert len(world.list_faults()) == 1
        """,
    )
    run(pytester).assert_outcomes(passed=1)


def test_a_request_that_asks_for_no_machine(pytester: pytest.Pytester) -> None:
    """Whether it does is known when the test is over: a marker that has told nobody anything is a warning, unless it has failed."""
    write(
        pytester,
        """
        import pytest

        @pytest.fixture(autouse=True)
        def everywhere(request):
            if "late" in request.node.name:
                request.getfixturevalue("simulate")

        @pytest.mark.topology("nvlink-8")
        def test_late():
            pass

        @pytest.mark.strict_migrations
        def test_migrations(migrations):
            pass

        @pytest.mark.topology("nvlink-8")
        def test_topology():
            pass

        @pytest.mark.faults(loss=0.5)
        def test_faults(migrations):
            pass

        @pytest.mark.strict_migrations
        def test_strict(hmmnet_seed):
            pass

        @pytest.mark.topology("nvlink-8")
        def test_wrong():
            assert False, "by itself"

        @pytest.mark.topology("nvlink-8")
        def test_skipped():
            pytest.skip("today")
        """,
    )
    wanted = [f"{name}(...) on a test without a machine: ask for *" for name in ("topology", "faults", "strict_migrations")]
    result = run(pytester, "-W", "default::hmmnet.testing.IdleMarkerWarning")
    result.assert_outcomes(passed=5, failed=1, skipped=1, warnings=3)
    result.stdout.fnmatch_lines_random([*(f"*IdleMarkerWarning: {line}" for line in wanted), "*AssertionError: by itself"])
    result = run(pytester)
    result.assert_outcomes(passed=2, failed=4, skipped=1)
    result.stdout.fnmatch_lines_random([*wanted, "*AssertionError: by itself"])
    assert "plugin.py" not in result.stdout.str()


def test_a_machine_that_nobody_sees(pytester: pytest.Pytester) -> None:
    """A fixture of the suite's own that reads the marker, or that may ask for a machine later: the tests pass."""
    write(
        pytester,
        """
        import hmmnet
        import pytest

        pytestmark = pytest.mark.filterwarnings("default::hmmnet.testing.IdleMarkerWarning")

        @pytest.fixture
        def devices(request):
            async def main(machine):
                return machine.device_names

            return hmmnet.simulate(main, request.node.get_closest_marker("topology").args[0]).value

        @pytest.fixture
        def machine(devices):
            return devices

        @pytest.fixture
        def factory(request):
            return lambda: request.getfixturevalue("simulated_machine")

        @pytest.mark.topology("dmirror-4")
        def test_own(devices):
            assert len(devices) == 4

        @pytest.mark.topology("dmirror-4")
        def test_named(machine):
            assert len(machine) == 4

        @pytest.mark.topology("dmirror-4")
        @pytest.mark.parametrize("called", [True, False])
        def test_later(factory, called):
            if called:
                assert len(factory().device_names) == 4
        """,
    )
    run(pytester).assert_outcomes(passed=4, warnings=2)


def test_a_test_that_is_skipped_has_use_for_no_marker(pytester: pytest.Pytester) -> None:
    """It is skipped, and no error, whatever it says of machines."""
    write(
        pytester,
        """
        import pytest
        from hmmnet.testing import PolicyContract

        @pytest.mark.skip("today")
        @pytest.mark.topology("nvlink-8")
        def test_it():
            pass

        @pytest.mark.skip("today")
        @pytest.mark.topology("nvlink-8")
        class TestMine(PolicyContract):
            policy = "demand"
        """,
    )
    result = run(pytester, "-k", "test_it or at_once")
    result.assert_outcomes(skipped=2)


def test_default_machine(pytester: pytest.Pytester) -> None:
    """hmmnet_topology is the machine of tests that name none; a file is seen from the root of the suite."""
    (pytester.path / "mine.toml").write_text(Path(__file__).parents[2].joinpath("hmmnet/topology/presets/two-gpus.toml").read_text())
    (pytester.path / "inside").mkdir()
    text = """
    import pytest

    def test_mine(simulated_machine):
        assert simulated_machine.device_names == ("gpu0", "gpu1")

    @pytest.mark.topology("dmirror-4")
    def test_other(simulated_machine):
        assert len(simulated_machine.device_names) == 4
    """
    write(pytester, text, "inside/test_mine.py", ini="hmmnet_topology = mine.toml\n")
    run(pytester).assert_outcomes(passed=2)
    result = run(pytester, "-o", "hmmnet_topology=nvlnk-8")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["hmmnet_topology = nvlnk-8: *did you mean*"])
