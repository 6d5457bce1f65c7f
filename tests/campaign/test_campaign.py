"""Campaigns: seeds without a violation, the same twice, and what is found told, repeated and made short.

The long campaign is ``hmmnet campaign --seeds 0:10000 --jobs N``.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hmmnet.campaign.campaign import AHEAD, Summary, collect_rarely, run_campaign, try_seed
from hmmnet.campaign.crew import Outcome
from hmmnet.campaign.draw import ANY_DEVICES, MIXES, SOMETIMES, draw
from hmmnet.campaign.machines import devices_of, topology_of
from hmmnet.campaign.nemesis import all_faults
from hmmnet.campaign.places import Pair
from hmmnet.campaign.program import Harm, Layout, Planned, Program, Step, read
from hmmnet.campaign.recipes import ADVISED, ALONE, FAMILIES, NOT_DRAWN, RECIPES
from hmmnet.campaign.shrink import Shrinker, without, without_actor, without_device_number, without_region
from hmmnet.campaign.sweep import Cell
from hmmnet.campaign.trial import Verdict, run_program
from hmmnet.campaign.words import VICTIM_ADDRESS, VICTIM_BYTES
from hmmnet.campaign.workers import workers
from hmmnet.cli import exit_code
from hmmnet.errors import HmmnetError
from hmmnet.faults import KINDS, Plan, fault
from hmmnet.faults.effects import told_at
from hmmnet.faults.kinds import Fault
from hmmnet.faults.targets import target_mistakes
from hmmnet.launcher.directory import process_started
from hmmnet.sim import Trace
from hmmnet.sim.waits import find_cycle
from tests import disks

SEEDS = range(24)
KEPT = Path(__file__).with_name("kept")


def hmmnet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hmmnet", *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_standard_campaign(seed: int) -> None:
    """200 operations, faults of all kinds: every word is right, the machine is well again, nothing has leaked."""
    found = try_seed(seed)
    assert found.violations == [], f"again: hmmnet replay {seed}"
    assert found.operations == 200


@pytest.mark.parametrize("file", sorted(KEPT.glob("*.json")), ids=lambda file: file.stem)
def test_programs_that_failed_once(file: Path) -> None:
    """Each was a seed that found a bug, which its note tells: kept as it was drawn then."""
    program = read(file)
    assert program.note
    assert run_program(program).violations == []


def test_the_campaign_uses_everything() -> None:
    """Every kind of operation, model and memory is drawn within a hundred seeds; the standard machine has four devices."""
    programs = [draw(seed) for seed in range(100)]
    assert {step.kind for program in programs for step in program.steps} >= set(SOMETIMES)
    assert {harm.kind for program in programs for harm in program.harms} == {"death", "partition"}
    text = "".join(program.machine for program in programs)
    assert all(word in text for word in ('"dmirror"', '"gpu"', '"coherent"', '"private"'))
    assert all(devices_of(program.machine) == ("dev0", "dev1", "dev2", "dev3") for program in programs)
    assert {layout.kind for program in programs for layout in program.regions} == {"anon", "shared", "file", "huge"}
    assert any(program.limit_pages for program in programs)


def test_machines_of_other_sizes() -> None:
    """As many devices as are wanted; or as each seed draws."""
    assert len(devices_of(draw(0, devices=7).machine)) == 7
    assert {len(devices_of(draw(seed, devices=ANY_DEVICES).machine)) for seed in range(40)} == {1, 2, 3, 4}
    with pytest.raises(HmmnetError, match="at most 64 devices, not 65"):
        draw(0, devices=65)


def test_every_kind_is_drawn_or_has_its_reason() -> None:
    """The whole catalogue: each kind by some seed, on a target that the machine has, or named with why not."""
    assert set(RECIPES) | set(NOT_DRAWN) == set(KINDS)
    assert not set(RECIPES) & set(NOT_DRAWN)
    assert all(NOT_DRAWN.values())
    seen = set()
    for seed in range(1000):
        program = draw(seed)
        faults = all_faults(program)
        seen |= {fault.kind.name for fault in faults}
        assert not [wrong for fault in faults for wrong in target_mistakes(fault, topology_of(program.machine), "sim")]
    assert seen == set(RECIPES) - ALONE


@pytest.mark.parametrize("at", [0, 7, 19])
@pytest.mark.parametrize(("seed", "mix"), [(1, "all"), (3, "process"), (5, "all")])
def test_a_host_that_crashes_is_no_violation(seed: int, mix: str, at: int) -> None:
    """No seed draws it; in a program that somebody has written it ends everything, which is what is asked of it."""
    crash = Planned(at, '[[fault]]\nkind = "host.crash"\n')
    program = draw(seed, mix, 20)
    verdict = run_program(msgspec.structs.replace(program, planned=(*program.planned, crash)))
    assert verdict.violations == []
    assert verdict.outcome.faults["host.crash"] == 1


@pytest.mark.parametrize("deed", ["mprotect", "mremap", "munmap", "madvise"])
def test_what_changes_memory_is_drawn_with_a_range(deed: str) -> None:
    """Of the victim's own memory, and at once not before there is any; at a point that tells its pages it is at those."""
    faults = [fault for seed in range(400) for fault in all_faults(draw(seed, f"process.{deed}"))]
    at_once = [fault for fault in faults if fault.at_once]
    assert at_once
    told = [one for one in faults if not one.at_once and "range" in told_at(one.settings["point"], "call")]
    assert told
    assert all(one.end == 0 for one in told)
    assert all(VICTIM_ADDRESS <= one.start < one.end <= VICTIM_ADDRESS + VICTIM_BYTES for one in faults if one not in told)
    first = [fault for seed in range(400) for text in draw(seed, f"process.{deed}").faults for fault in Plan.parse(text).faults]
    assert not [fault for fault in first if isinstance(fault, Fault) and fault.at_once]


def test_all_kinds_of_advice_are_drawn() -> None:
    """Such as keeps data and such as takes them away."""
    advice = {fault.settings["advice"] for seed in range(300) for fault in all_faults(draw(seed, "process.madvise"))}
    assert advice == set(ADVISED)


def test_swarm_style() -> None:
    """Seeds differ in which families they have, and many have none or all but one of them left out."""
    families = [frozenset(fault.kind.family for fault in all_faults(draw(seed))) for seed in range(200)]
    assert len(set(families)) > 100
    assert all(len(found) < len(FAMILIES) for found in families)
    assert any(found == frozenset() for found in families)


@pytest.mark.parametrize("mix", ["nodes", "copy engine", "link.down", "process.exit", "restart.kept"])
def test_a_family_or_a_kind_is_a_mix(mix: str) -> None:
    """Only that is drawn, and by every seed."""
    for seed in range(20):
        faults = all_faults(draw(seed, mix))
        assert faults
        assert all(mix in (fault.kind.family, fault.kind.name) for fault in faults)


def test_faults_are_counted_by_kind() -> None:
    """How often each fired, under its name in the catalogue."""
    program = draw(0, "none", 60)
    late, cut = fault("invalidate.duplicate"), fault("link.slow", "*dev0", factor=0.5, lasts=0.1)
    planned = (Planned(3, Plan([cut]).as_toml()),)
    found = run_program(msgspec.structs.replace(program, faults=(Plan([late]).as_toml(),), planned=planned)).outcome
    assert found.violations == []
    assert found.faults["link.slow"] == 1
    assert found.faults["invalidate.duplicate"] > 1
    assert set(found.faults) == {"link.slow", "invalidate.duplicate"}


def test_a_fault_on_nothing_does_nothing() -> None:
    """A program of which a device was left out is a program."""
    program = msgspec.structs.replace(draw(0, "none", 20), faults=(Plan([fault("crash", "dev9")]).as_toml(),))
    found = run_program(program).outcome
    assert (found.violations, found.faults) == ([], {})


def test_a_seed_is_one_run() -> None:
    """The same seed has the same digest, traced or not the same outcome; another has another."""
    first, again, other = (run_program(draw(seed), trace=Trace()) for seed in (3, 3, 4))
    assert first.digest == again.digest != other.digest
    assert first.outcome == again.outcome == run_program(draw(3)).outcome


def test_the_collector_decides_nothing() -> None:
    """A run without Python's cyclic collector is the run with it: nothing of a machine hangs on when objects are found to be unused."""
    with_it = [run_program(draw(seed)).outcome for seed in (1, 7)]
    gc.disable()
    try:
        without = [run_program(draw(seed)).outcome for seed in (1, 7)]
    finally:
        gc.enable()
    assert with_it == without


def test_unknown_mix() -> None:
    """Says which there are."""
    with pytest.raises(HmmnetError, match=f"there are {', '.join(MIXES)}"):
        run_campaign(range(1), "everything")


def test_several_processes_find_the_same() -> None:
    """Each seed once, whoever ran it."""
    seeds = 2 * AHEAD + 3
    alone, together = (run_campaign(range(seeds), "none", operations=5, jobs=jobs) for jobs in (1, 2))
    assert alone.seeds == together.seeds == seeds
    assert (alone.operations, alone.faults) == (together.operations, together.faults)


def broken(program: Program) -> Any:
    """A stand-in for a run that fails when one step, one harm and one device are there."""
    verdict = run_program(msgspec.structs.replace(program, steps=(), harms=(), faults=(), planned=()))
    if any(step.serial == 77 for step in program.steps) and program.harms and "dev2" in program.machine:
        verdict.outcome.violations.append(_violation())
    return verdict


def _violation() -> Any:
    from hmmnet.campaign.crew import Violation

    return Violation("history", "made up")


def failing() -> Program:
    """A program with faults, and with harms of the device that step 77 means: what the failure needs has one device."""

    def fits(program: Program) -> bool:
        step = next(step for step in program.steps if step.serial == 77)
        return bool(program.harms and program.faults and program.planned) and {2} == {step.device, *(harm.device for harm in program.harms)}

    return next(program for program in map(draw, range(1000)) if fits(program))


def test_shrink_leaves_what_the_failure_needs(tmp_path: Path) -> None:
    """One step, one harm, one device, one region, one actor, no fault; the file holds it."""
    shrinker = Shrinker(failing(), run=broken)
    short = shrinker.shrink()
    assert [step.serial for step in short.steps] == [77]
    assert len(short.harms) == 1
    assert (short.faults, short.planned, short.victims) == ((), (), 0)
    assert devices_of(short.machine) == ("dev2",)
    assert (short.actors, len(short.regions)) == (1, 1)
    (tmp_path / "bug.json").write_text(short.text())
    assert read(tmp_path / "bug.json") == short
    assert "made up" in short.note


def test_a_shrink_that_is_interrupted_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shortest so far is in the file, with why it fails, and it is said that it may become shorter."""
    whole, short, runs = tmp_path / "whole.json", tmp_path / "short.json", iter(range(12))

    def interrupted(program: Program) -> Any:
        if next(runs, None) is None:
            raise KeyboardInterrupt
        return broken(program)

    whole.write_text(failing().text())
    monkeypatch.setattr("hmmnet.campaign.shrink.Shrinker", partial(Shrinker, run=interrupted))
    assert exit_code(["shrink", str(whole), "-o", str(short)]) == 130
    kept = read(short)
    assert kept.note == "history: made up"
    assert (kept.faults, kept.planned) == ((), ())
    told = capsys.readouterr().out
    assert f"200 steps became {len(kept.steps)} in 12 runs, when it was interrupted" in told
    assert f"again: hmmnet replay {short}" in told


def test_what_shrink_cannot_write_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Minutes of work are not lost to a full disk; nor is the file that it read, where that was to be written."""
    file, short = tmp_path / "bug.json", tmp_path / "short.json"
    file.write_text(failing().text())

    def fails(program: Program) -> Verdict:
        return Verdict(program, Outcome(violations=[_violation()] if any(step.serial == 77 for step in program.steps) else []))

    monkeypatch.setattr("hmmnet.campaign.shrink.Shrinker", partial(Shrinker, run=fails))
    with disks.full():
        assert exit_code(["shrink", str(file), "-o", str(file)]) == 1
    told = capsys.readouterr()
    assert "what was to be in the file is on standard output" in told.err
    assert f"hmmnet shrink: {file}: cannot be written: " in told.err
    short.write_text(told.out)
    assert read(short).note == "history: made up"
    assert len(read(short).steps) < len(read(file).steps) == len(failing().steps)


def test_what_is_left_out_leaves_the_rest_as_it_is() -> None:
    """Steps mean the same region and the same device as before; what waits for operations that have ended waits for fewer."""
    steps = tuple(
        Step(actor, kind, region=region, device=device, serial=serial)
        for serial, (actor, kind, region, device) in enumerate(
            [(0, "load", 0, 0), (1, "load", 1, 1), (0, "load", 5, 5), (1, "home", 2, 0), (0, "home", 4, 2), (2, "home", 0, 3)], 1
        )
    )
    regions = (Layout("anon", 2), Layout("file", 3), Layout("shared", 4))
    program = msgspec.structs.replace(
        draw(0, "none", 5), steps=steps, regions=regions, actors=3, planned=(Planned(4, "x"), Planned(1, "y"))
    )
    fewer = without_region(program, 1)
    assert fewer.regions == (regions[0], regions[2])
    assert [(step.serial, step.region) for step in fewer.steps] == [(1, 0), (3, 1), (5, 3), (6, 0)]
    assert [(step.serial, step.device) for step in without_device_number(program, 1).steps] == [(1, 0), (4, 0), (5, 1), (6, 2)]
    assert [(step.serial, step.actor) for step in without_actor(program, 1).steps] == [(1, 0), (3, 0), (5, 0), (6, 1)]
    shorter = without(program, "steps", 2, 5)
    assert [step.serial for step in shorter.steps] == [1, 2, 6]
    assert [planned.at for planned in shorter.planned] == [2, 1]


def test_what_does_not_fail_is_not_shrunk() -> None:
    """It says so, and leaves it as it is."""
    program = draw(0, "none", 5)
    shrinker = Shrinker(program)
    assert not shrinker.fails
    assert shrinker.shrink() is program


def test_command_line(tmp_path: Path) -> None:
    """JSON as documented; replay gives a digest twice; a file plays like its seed; wrong words are said in one line."""
    done = hmmnet("campaign", "--seeds", "0:3", "--faults", "none", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"seeds", "operations", "faults", "violations", "seconds"}
    assert (report["seeds"], report["operations"], report["violations"]) == (3, 600, [])
    (tmp_path / "five.json").write_text(draw(5).text())
    digests = [json.loads(hmmnet("replay", what, "--json").stdout)["digest"] for what in ("5", str(tmp_path / "five.json"))]
    assert digests[0] == digests[1]
    for arguments, code, words in (
        (("campaign", "--seeds", "7:3"), 2, "names no seeds"),
        (("campaign", "--faults", "some"), 2, "there is no mix"),
        (("campaign", "--faults", "row_remap.pending"), 2, "row_remap.pending is drawn by no campaign: memory here has no rows"),
        (("campaign", "--dask", "tcp://127.0.0.1:1"), 1, "dask"),
        (("campaign", "--dask", "tcp://127.0.0.1:1", "--jobs", "2"), 2, "--jobs means nothing with --dask"),
        (("replay", str(tmp_path / "none.json")), 2, "there is no such file"),
        (("shrink", "0", "--operations", "5", "-o", str(tmp_path / "x")), 1, "seed 0 does not fail"),
        (("shrink", "0", "--operations", "5", "-o", "/nowhere/x"), 2, "/nowhere/x: cannot be written: No such file"),
    ):
        refused = hmmnet(*arguments)
        assert refused.returncode == code, arguments
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--world real --operations 5", "--operations means nothing in --world real, which has --seeds, --rounds, --cables"),
        ("--world real --jobs 2 --faults none --dask x", "--faults, --jobs, --dask mean nothing in --world real"),
        ("--world real --seeds 5:9", "write --seeds 5, not 5:9"),
        ("--rounds 3", "--rounds means nothing in --world sim, which has --seeds, --faults, --jobs, --dask, --operations, --devices"),
        ("--world sim --cables --rounds 3", "--rounds, --cables mean nothing in --world sim"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(options: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, before anything is run."""
    assert exit_code(["campaign", *options.split()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err
    assert told.err.count("\n") == 1


def test_a_death_at_any_message_needs_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device dies when message 40 of all is sent, also where nobody reads the story: the same run, and what shrink says is no crash."""
    program = msgspec.structs.replace(draw(8, "none", 40), harms=(Harm(40, "message", seconds=0.01),))
    traced, alone = run_program(program, trace=Trace()).outcome, run_program(program).outcome
    assert alone.faults["message"] == 1
    assert alone == traced
    (tmp_path / "dies.json").write_text(program.text())
    assert exit_code(["shrink", str(tmp_path / "dies.json"), "-o", str(tmp_path / "short.json")]) == 1
    assert "does not fail" in capsys.readouterr().err


def test_the_faults_of_a_campaign_fit_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many kinds there were; each with its count beside it."""
    monkeypatch.setenv("COLUMNS", "60")
    assert exit_code(["campaign", "--seeds", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("faults: "))
    assert lines[first + 1].startswith("        ")
    assert max(map(len, lines)) <= 60


def test_interrupted_it_prints_what_it_found() -> None:
    """Ctrl-C: the JSON of the seeds that were run."""
    command = [sys.executable, "-m", "hmmnet", "campaign", "--seeds", "0:100000", "--faults", "none", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "1 of 100000 seeds" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(output)["seeds"] >= 1


def test_an_interrupted_pool_is_gone_at_once() -> None:
    """Workers do not finish what they have, nor what they took in advance; processes of the program's own stay."""
    own = get_context("fork").Process(target=time.sleep, args=(60,))
    own.start()
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt), workers(2, collect_rarely) as pool:
        waiting = [pool.submit(time.sleep, 60) for _ in range(8)]
        while not any(one.running() for one in waiting):
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert time.monotonic() - began_s < 30
    assert active_children() == [own]
    own.kill()
    own.join()


STARTING = """
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from hmmnet.campaign import workers

def begin():
    print("starting\\n", end="", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    workers.ProcessPoolExecutor = partial(ProcessPoolExecutor, mp_context=get_context("METHOD"))
    try:
        with workers.workers(2, begin) as pool:
            print(pool.submit(abs, -1).result())
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_ctrl_c_while_workers_start_is_one(method: str, tmp_path: Path) -> None:
    """A terminal sends it to them, too, and that a worker ends as it starts breaks a pool: they hear none, however they are started."""
    script = tmp_path / "starting.py"
    script.write_text(STARTING.replace("METHOD", method))
    with subprocess.Popen(
        [sys.executable, "-P", str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert [line for line in output.splitlines() if line != "starting"] == ["interrupted"]
    assert errors == ""


def test_nobody_starts_more_workers_than_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a second to start, and one would have nothing to do."""
    started = []

    def noted(jobs: int, initializer: Callable[[], None]) -> AbstractContextManager[ProcessPoolExecutor]:
        started.append(jobs)
        return workers(jobs, initializer)

    monkeypatch.setattr("hmmnet.campaign.campaign.workers", noted)
    assert run_campaign([0, 1], "none", 5, jobs=40).seeds == 2
    assert run_campaign([3], "none", 5, jobs=40).seeds == 1
    assert started == [2]


def test_workers_of_a_killed_campaign_die_with_it() -> None:
    """Nobody else would end them."""
    command = [sys.executable, "-m", "hmmnet", "campaign", "--seeds", "0:100000", "--faults", "none", "--jobs", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "1 of 100000 seeds" in process.stderr.readline()
        children = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(children) == 2
        process.kill()
    deadline_s = time.monotonic() + 30
    while any(process_started(child) for child in children):
        assert time.monotonic() < deadline_s, "workers are left"
        time.sleep(0.05)


def test_an_interrupted_sweep_prints_its_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What there is; and no half of a document is written."""

    def interrupted(*_: object, table: dict[Pair, Cell], **__: object) -> None:
        table[Pair("message", "Migrate", "loss")] = Cell(Counter(same=2))
        raise KeyboardInterrupt

    monkeypatch.setattr("hmmnet.campaign.sweep.sweep", interrupted)
    assert exit_code(["sweep", "tour", "-o", str(tmp_path / "table.md")]) == 130
    assert "1 of 1 pairs were hit, in 2 runs" in capsys.readouterr().out
    assert not (tmp_path / "table.md").exists()


def test_summary_adds_up() -> None:
    """Violations with their seeds, faults by kind."""
    summary = Summary("all")
    for seed in (4, 2):
        summary.add(msgspec.structs.replace(try_seed(0, "none", 5), seed=seed, violations=[("history", "x")], faults={"loss": 2}))
    assert [one["seed"] for one in summary.as_json()["violations"]] == [2, 4]
    assert summary.as_json()["faults"] == {"loss": 4}


def test_cycles_are_found() -> None:
    """In a graph of who waits for whom."""
    assert find_cycle({0: [1], 1: [2], 2: [1], 3: []}) == [1, 2]
    assert find_cycle({0: [1], 1: []}) == []


def test_garbage_is_looked_for_rarely_while_seeds_run() -> None:
    """And as before when they have ended; a seed is the same seed then."""
    before = gc.get_threshold()
    seen: list[tuple[int, ...]] = []
    summary = run_campaign(range(2), on_found=lambda *_: seen.append(gc.get_threshold()))
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)
    assert len(seen) == 2
    assert min(seen) > before
    assert summary.operations == sum(try_seed(seed).operations for seed in range(2))


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_table_that_cannot_be_written_is_printed(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A sweep of hours is not lost to a full disk."""

    def swept(*_: object, table: dict[Pair, Cell], **__: object) -> None:
        table[Pair("message", "Migrate", "loss")] = Cell(Counter(same=2))

    monkeypatch.setattr("hmmnet.campaign.sweep.sweep", swept)
    with disks.full():
        assert exit_code(["sweep", "tour", "-o", str(tmp_path / "table.md"), *options]) == 1
    told = capsys.readouterr()
    assert ('"runs": 2' if options else "1 of 1 pairs were hit, in 2 runs") in told.out
    assert told.err.splitlines()[-1].startswith(f"hmmnet sweep: {tmp_path}/table.md: cannot be written: ")
    assert not list(tmp_path.iterdir())
