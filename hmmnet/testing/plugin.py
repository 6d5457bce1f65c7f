"""The pytest plugin: options, markers, fixtures, and what the report of a failing test ends with.

It is loaded at every start of pytest, so nothing of hmmnet that costs time is imported here: fixtures and markers load what they need when
a test uses them.

**Who runs an asynchronous test.** Machines live under trio. Where another plugin runs the test under trio (pytest-trio; anyio with its trio
backend) the machine is an asynchronous fixture like any other, and for a simulated one pytest-trio is told to run the test in virtual time.
In tests that block, and in those of asyncio, the machine's methods block. An asynchronous test that nobody else runs, this plugin runs.
"""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pytest

from .idle import CONTRACTS, IdleMarkerWarning, idle_at_collection, idle_marker
from .marks import MARKERS, Mark, MarkMistake, load_topology, read_faults, read_seeds, read_strict, read_topology

if TYPE_CHECKING:
    from hmmnet.faults.kinds import World

    from .case import Case
    from .migrations import Migrations
    from .story import Story
    from .worlds import Simulate

TOPOLOGY = "two-gpus"
LIMIT_S = 60.0
"""Real seconds that a test may keep a machine of real processes."""
STORY_LINES = 20

SEED = "hmmnet_seed"
AWAITED, SIMULATED_AWAITED = "_hmmnet_machine_awaited", "_hmmnet_simulated_awaited"
BLOCKING, SIMULATED_BLOCKING = "_hmmnet_machine_blocking", "_hmmnet_simulated_blocking"

STORY = "_hmmnet_story"

_case_key = pytest.StashKey["Case"]()
_asked_key = pytest.StashKey[set[str]]()
"""Which of our fixtures a test has asked for, by name or by its request."""

# A check that fails shows what it compared, as a test of the user's own does.
pytest.register_assert_rewrite("hmmnet.testing.device_contract", "hmmnet.testing.job_checks", "hmmnet.testing.policy_contract")


# --- options and markers --------------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options and settings."""
    group = parser.getgroup("hmmnet", "hmmnet: machines of several GPUs")
    group.addoption(
        "--hmmnet-seed",
        type=_seed,
        metavar="N",
        help="run every test that has a seed with exactly this one: what the report of a failed test says to do",
    )
    group.addoption(
        "--hmmnet-seeds", type=_count, metavar="N", help="run tests marked seeds(...) with seeds 0 to N-1, whatever the marker says"
    )
    group.addoption("--hmmnet-strict", action="store_true", default=None, help="an unexpected migration fails its test, in every test")
    parser.addini("hmmnet_topology", f"the machine of tests without a topology marker (default: {TOPOLOGY})", default=TOPOLOGY)
    parser.addini("hmmnet_strict", "an unexpected migration fails its test (default: false)", type="bool", default=False)
    parser.addini("hmmnet_timeout", f"real seconds that a test may keep a machine of real processes (default: {LIMIT_S:g})", default="")
    parser.addini("hmmnet_story", f"events that the report of a failed test ends with (default: {STORY_LINES}; 0: none)", default="")


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if seed < 0:
        raise pytest.UsageError(f"--hmmnet-seed {text}: a seed is a whole number from 0 on")
    return seed


def _count(text: str) -> int:
    try:
        return len(read_seeds(Mark((int(text),), {})))
    except (ValueError, MarkMistake):
        raise pytest.UsageError(f"--hmmnet-seeds {text}: a number of seeds is wanted, such as 100") from None


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known, and check the settings."""
    for text in MARKERS.values():
        config.addinivalue_line("markers", text)
    _limit_s(config)
    _story_lines(config)


def _limit_s(config: pytest.Config) -> float:
    text = str(config.getini("hmmnet_timeout") or LIMIT_S)
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = 0.0
    if not 0.0 < limit_s < float("inf"):
        raise pytest.UsageError(f"hmmnet_timeout = {text}: a positive number of seconds is wanted")
    return limit_s


def _story_lines(config: pytest.Config) -> int:
    text = str(config.getini("hmmnet_story") or STORY_LINES)
    if not text.isdecimal():
        raise pytest.UsageError(f"hmmnet_story = {text}: a number of lines is wanted")
    return int(text)


# --- collection -----------------------------------------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Check the test's markers, and make a test of each of its seeds; behind all other parameters."""
    item = metafunc.definition
    seeds, mistake = _checked_seeds(item)
    if mistake:
        pytest.fail(f"{item.nodeid}: {mistake}", pytrace=False)
    if SEED not in metafunc.fixturenames and any(mark.name == "seeds" for mark in item.own_markers):
        pytest.fail(
            f"{item.nodeid}: seeds(...) on a test without a seed: ask for simulated_machine, simulate, machine or {SEED}", pytrace=False
        )
    idle = idle_at_collection(item, metafunc.fixturenames)
    if idle:
        pytest.fail(f"{item.nodeid}: {idle}", pytrace=False)
    if SEED not in metafunc.fixturenames:
        return
    if not seeds:
        return
    forced, count = metafunc.config.getoption("hmmnet_seed"), metafunc.config.getoption("hmmnet_seeds")
    chosen = [forced] if forced is not None else list(range(count)) if count else seeds
    metafunc.parametrize(SEED, chosen, indirect=True, ids=[f"seed{seed}" for seed in chosen])


def _checked_seeds(item: pytest.Item) -> tuple[Sequence[int], str]:
    """The seeds that the test's marker gives, and what is wrong with any of its markers."""
    try:
        _check_markers(item)
        marks = [Mark(mark.args, mark.kwargs) for mark in item.iter_markers("seeds")]
        return (read_seeds(marks[0]) if marks else []), ""
    except MarkMistake as mistake:
        return [], str(mistake)


def _check_markers(item: pytest.Item) -> None:
    """Raise MarkMistake for markers that cannot be used."""
    for mark in item.iter_markers("topology"):
        read_topology(Mark(mark.args, mark.kwargs), item.path.parent)
    faults = [Mark(mark.args, mark.kwargs) for mark in item.iter_markers("faults")]
    if faults:
        read_faults(faults, item.path.parent)
    for mark in item.iter_markers("strict_migrations"):
        read_strict(Mark(mark.args, mark.kwargs))


# --- one test -------------------------------------------------------------------------------------------------------------------------


def _seed_of(item: pytest.Item) -> int:
    callspec = getattr(item, "callspec", None)
    if callspec is not None and SEED in callspec.params:
        return int(callspec.params[SEED])
    return int(item.config.getoption("hmmnet_seed") or 0)


def _case(item: pytest.Item, fixture: str = "") -> Case:
    """What this test asks of its machine; now for the fixture called so."""
    item.stash.setdefault(_asked_key, set()).add(fixture)
    if _case_key not in item.stash:
        try:
            item.stash[_case_key] = _new_case(item)
        except MarkMistake as mistake:
            pytest.fail(str(mistake), pytrace=False)
    return item.stash[_case_key]


def _new_case(item: pytest.Item) -> Case:
    from .case import Case
    from .migrations import Migrations

    folder = item.path.parent
    mark = item.get_closest_marker("topology")
    if mark is not None:
        topology = read_topology(Mark(mark.args, mark.kwargs), folder)
    else:
        name = str(item.config.getini("hmmnet_topology"))
        topology = load_topology(name, item.config.rootpath, f"hmmnet_topology = {name}")
    plan = read_faults([Mark(mark.args, mark.kwargs) for mark in item.iter_markers("faults")], folder)
    return Case(_seed_of(item), topology, plan, _limit_s(item.config), Migrations(strict=_strict(item)))


def _strict(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("strict_migrations")
    if mark is not None:
        return read_strict(Mark(mark.args, mark.kwargs))
    return bool(item.config.getoption("hmmnet_strict") or item.config.getini("hmmnet_strict"))


def _way(request: pytest.FixtureRequest, *, simulated: bool) -> str:
    """Who runs this test: ``blocking`` (nobody under trio), ``awaited`` (another plugin, under trio), or ``here`` (this plugin)."""
    item = request.node
    if not inspect.iscoroutinefunction(_function(item)):
        return "blocking"
    if _run_by_pytest_trio(item):
        return "awaited"
    if item.get_closest_marker("asyncio") is not None:
        return "blocking"
    if "anyio_backend" in item.fixturenames:
        backend = request.getfixturevalue("anyio_backend")
        if (backend if isinstance(backend, str) else backend[0]) != "trio":
            return "blocking"
        return "here" if simulated else "awaited"
    return "here"


def _function(item: Any) -> Any:
    """The test's function, also behind hypothesis."""
    function = getattr(item, "obj", None)
    return getattr(getattr(function, "hypothesis", None), "inner_test", function)


def _run_by_pytest_trio(item: pytest.Item) -> bool:
    return item.get_closest_marker("trio") is not None and item.config.pluginmanager.hasplugin("trio")


def _machine(request: pytest.FixtureRequest, fixture: str) -> Any:
    """The machine of the fixture called `fixture`, as this test wants it."""
    case = _case(request.node, fixture)
    if case.machine not in ("", fixture):
        pytest.fail(f"a test has one machine: {case.machine} or {fixture}, not both", pytrace=False)
    case.machine = fixture
    simulated = fixture == "simulated_machine"
    wrong = _impossible(case, "sim" if simulated else "real")
    if wrong:
        pytest.fail(wrong, pytrace=False)
    way = _way(request, simulated=simulated)
    if way == "here":
        return _waiting(case, simulated=simulated)
    names = {"awaited": (AWAITED, SIMULATED_AWAITED), "blocking": (BLOCKING, SIMULATED_BLOCKING)}
    return request.getfixturevalue(names[way][simulated])


def _impossible(case: Case, world: World) -> str:
    """Which faults of the test its machine cannot have, and why; nothing if there is none."""
    from hmmnet.errors import HmmnetError

    from .worlds import ELSEWHERE

    try:
        case.plan.check(world, case.topology)
    except HmmnetError as error:
        return f"{error}\n{ELSEWHERE}" if world == "real" and not _impossible(case, "sim") else str(error)
    return ""


def _waiting(case: Case, *, simulated: bool) -> Any:
    import trio

    from hmmnet.sim import run_virtual

    from .worlds import Waiting, real, virtual

    if simulated:
        return Waiting(partial(virtual, case), partial(run_virtual, seed=case.seed))
    return Waiting(partial(real, case), trio.run)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test of pytest-trio with a simulated machine runs in virtual time."""
    if "simulated_machine" in getattr(item, "fixturenames", ()) and _run_by_pytest_trio(item):
        item.add_marker(pytest.mark.trio(run=partial(_run_virtual, _seed_of(item))), append=False)


def _run_virtual(seed: int, main: Any, *, clock: Any = None, instruments: Any = ()) -> Any:
    """What pytest-trio calls instead of `trio.run`."""
    from hmmnet.sim import run_virtual

    if clock is not None or instruments:
        pytest.fail("simulated_machine brings the clock of its virtual time: no other clock, and no instrument, beside it", pytrace=False)
    return run_virtual(main, seed=seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Run an asynchronous test that nobody else runs; when it has passed, say what moved against its will."""
    arguments = getattr(item, "funcargs", {})
    waiting = [name for name, value in arguments.items() if type(value).__name__ == "Waiting"]
    original = getattr(item, "obj", None)
    if waiting:
        item.obj = partial(_run_here, original)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if waiting:
            item.obj = original  # type: ignore[attr-defined]
    _warn_of_idle(item)
    case = item.stash.get(_case_key, None)
    complaint = case.migrations.complaint() if case is not None else ""
    if case is not None and complaint:
        case.forbidden = True
        pytest.fail(complaint, pytrace=False)


def _warn_of_idle(item: pytest.Item) -> None:
    """Where the test has passed, and has asked for no machine that its markers tell of. A failure of one line where warnings are errors."""
    idle = idle_marker(item, {*getattr(item, "fixturenames", ()), *item.stash.get(_asked_key, ())})
    if idle:
        try:
            item.warn(IdleMarkerWarning(idle))
        except IdleMarkerWarning as warning:
            pytest.fail(str(warning), pytrace=False)


def _run_here(test: Any, **arguments: Any) -> None:
    """Run an asynchronous test under trio, in the world of its machine."""
    from contextlib import AsyncExitStack

    from hmmnet.blocking import only_error

    from .worlds import Waiting

    async def main() -> None:
        async with AsyncExitStack() as stack:
            for name, value in arguments.items():
                if isinstance(value, Waiting):
                    arguments[name] = await stack.enter_async_context(value.enter())
            await test(**arguments)

    (run,) = {value.run for value in arguments.values() if isinstance(value, Waiting)}
    with only_error():
        run(main)


# --- the report of a failed test ------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let it end with what happened on the machine, and how to see it again."""
    if call.excinfo is not None and (_case_key in item.stash or SEED in getattr(item, "fixturenames", ())):
        _show_own_lines(item, call.excinfo)
    report = yield
    if report.failed and (_case_key in item.stash or SEED in getattr(item, "fixturenames", ())):
        if _case_key in item.stash:
            _tell(report, item.stash[_case_key], _story_lines(item.config))
        report.sections.append(("hmmnet: see it again", _replay(item)))
    return report


def _tell(report: pytest.TestReport, case: Case, most: int) -> None:
    """What happened on the test's machine, and what crashed there."""
    story = case.story.shown(most, marked=case.forbidden)
    if story:
        report.sections.append(("hmmnet: what happened", "\n".join(story)))
    crashes = case.crashed()
    if crashes:
        report.sections.append(("hmmnet: what crashed in devices", "\n".join(crashes)))


WITHIN = frozenset({"hmmnet", "trio", "outcome", "contextlib", "_pytest", "pluggy"})
"""Packages whose lines say nothing of what a test did wrong."""
CHECKS = CONTRACTS | {f"hmmnet.testing.{module}" for module in ("outcomes", "job_checks", "scripted_host", "compared")}
"""Modules whose AssertionErrors are about who uses them."""


def _show_own_lines(item: pytest.Item, failure: pytest.ExceptionInfo[BaseException]) -> None:
    """An error that a machine answers with on purpose, and what a check of ours complains of, is shown where the test asked for it, or in
    the check of a contract; a bug of ours, and with --full-trace everything, as deep as it goes.
    """
    if not _answered(failure) or item.config.getoption("fulltrace"):
        return
    callspec = getattr(item, "callspec", None)
    check = getattr(callspec.params.get("check") if callspec is not None else None, "__code__", None)
    own = getattr(_function(item), "__module__", "")

    def shows(line: TracebackType) -> bool:
        module = _module(line)
        if module == own and own in CHECKS:
            return line.tb_frame.f_code is check
        return module == own or module.partition(".")[0] not in WITHIN

    *_, last = _chain(failure.tb)
    lines = _cut(failure.tb, shows) or (last if _module(last) in CHECKS else None)
    if lines is not None:
        failure.traceback = type(failure.traceback)(lines)
    cause = failure.value.__cause__
    while cause is not None:
        cause.__traceback__ = _cut(cause.__traceback__, shows) or cause.__traceback__
        cause = cause.__cause__


def _answered(failure: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether it is no bug of ours."""
    from hmmnet.errors import HmmnetError

    if isinstance(failure.value, HmmnetError):
        return True
    *_, last = _chain(failure.tb)
    return isinstance(failure.value, AssertionError) and _module(last) in CHECKS


def _cut(whole: TracebackType | None, shows: Callable[[TracebackType], bool]) -> TracebackType | None:
    """Its lines that are shown."""
    lines: TracebackType | None = None
    for line in reversed(list(_chain(whole))):
        if shows(line):
            lines = TracebackType(lines, line.tb_frame, line.tb_lasti, line.tb_lineno)
    return lines


def _module(line: TracebackType) -> str:
    return str(line.tb_frame.f_globals.get("__name__", ""))


def _chain(line: TracebackType | None) -> Iterator[TracebackType]:
    while line is not None:
        yield line
        line = line.tb_next


def _replay(item: pytest.Item) -> str:
    """The command that runs this very test again, under the settings of hmmnet's that this command line gave."""
    inside = str(item.nodeid).partition("::")[2]
    callspec = getattr(item, "callspec", None)
    if callspec is not None and set(callspec.params) == {SEED}:
        inside = inside[: inside.rindex("[")]
    place = f"{os.path.relpath(item.path, item.config.invocation_params.dir)}::{inside}"
    settings = ["--hmmnet-strict"] if item.config.getoption("hmmnet_strict") else []
    for given in item.config.getoption("override_ini") or ():
        if given.startswith("hmmnet_"):
            settings += ["-o", shlex.quote(given)]
    return " ".join(["pytest", shlex.quote(place), "--hmmnet-seed", str(_seed_of(item)), *settings])


# --- fixtures -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(name=SEED)
def hmmnet_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this test: of its marker seeds(...), of --hmmnet-seed, or 0."""
    return _seed_of(request.node)


@pytest.fixture
def machine(request: pytest.FixtureRequest, hmmnet_seed: int) -> Any:  # noqa: ARG001 - a test with a machine has a seed
    """A running machine of real processes, of the marker topology(...), with the faults of the marker faults(...) that real ones can have;
    gone when the test is over, whatever becomes of it.

    In a test under trio a `hmmnet.machine.LaunchedMachine`, otherwise a `LaunchedBlockingMachine`.
    """
    return _machine(request, "machine")


@pytest.fixture
def simulated_machine(request: pytest.FixtureRequest, hmmnet_seed: int) -> Any:  # noqa: ARG001 - see machine
    """A machine in virtual time, from the test's seed, with the faults of the marker faults(...).

    In a test under trio, which then runs in virtual time, a `hmmnet.sim.SimulatedMachine`; otherwise a `hmmnet.testing.FrozenMachine`,
    whose time passes in calls only.
    """
    return _machine(request, "simulated_machine")


@pytest.fixture
def simulate(request: pytest.FixtureRequest, hmmnet_seed: int) -> Simulate:  # noqa: ARG001 - see machine
    """Call it with an asynchronous function: ``simulate(main)`` runs main(machine) as `hmmnet.simulate`, with the test's markers."""
    from .worlds import Simulate

    return Simulate(_case(request.node, "simulate"))


@pytest.fixture
def migrations(request: pytest.FixtureRequest, hmmnet_seed: int) -> Migrations:  # noqa: ARG001 - see machine
    """What moves in this test, and what may: `hmmnet.testing.Migrations`."""
    return _case(request.node, "migrations").migrations


@pytest.fixture(name=STORY)
def _story(request: pytest.FixtureRequest) -> Story:
    """The story of a test whose machine is made by a contract."""
    return _case(request.node).story


@pytest.fixture(name=AWAITED)
async def _machine_awaited(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    from .worlds import real

    async with real(_case(request.node)) as made:
        yield made


@pytest.fixture(name=BLOCKING)
def _machine_blocking(request: pytest.FixtureRequest) -> Iterator[Any]:
    from .worlds import real_blocking

    with real_blocking(_case(request.node)) as made:
        yield made


@pytest.fixture(name=SIMULATED_AWAITED)
async def _simulated_awaited(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    from .worlds import virtual

    async with virtual(_case(request.node)) as made:
        yield made


@pytest.fixture(name=SIMULATED_BLOCKING)
def _simulated_blocking(request: pytest.FixtureRequest) -> Iterator[Any]:
    from .worlds import virtual_blocking

    with virtual_blocking(_case(request.node)) as made:
        yield made
