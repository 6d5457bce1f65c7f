"""``--seed`` of commands that start machines: which occurrence a fault hits by chance is the same each time, as real processes.

    hmmnet up --seed N    (launcher) ── host (chances of its own points) ──┬── gpu0 (chances of its own, by seed, name and life)
    hmmnet run --seed N                                                    └── gpu1

The oracle: a machine started with the same seed by `hmmnet.launch`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import hmmnet
from hmmnet.faults import Plan

from .test_up import hmmnet_command, up

PLAN = """
[[fault]]
kind = "point.fail"
point = "device.job_start"
probability = 0.5
[[fault]]
kind = "point.fail"
point = "home.explicit"
probability = 0.5
"""
STORY = '''
from hmmnet.errors import KernelError


async def story(machine):
    """Which of some jobs (faults in the device) and of some migrations home (faults in the host) fail: one letter each."""
    process = await machine.create_process()
    address = await process.malloc(4096)
    await process.write(address, bytes(4096))

    async def tried(work):
        try:
            await work
        except KernelError:
            return "x"
        return "."

    jobs = [await tried(process.launch("reduction", "gpu0", "remote", a=address, n=8, dtype="<u8")) for _ in range(24)]
    homes = []
    for _ in range(24):
        await process.migrate(address, 4096, "gpu1")
        homes.append(await tried(process.migrate(address, 4096, "host")))
    return {"jobs": "".join(jobs), "homes": "".join(homes)}
'''


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Machines of this test have a folder of their own, with a short name for sockets."""
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        yield Path(folder)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """The plan, and the workload."""
    (tmp_path / "plan.toml").write_text(PLAN)
    (tmp_path / "story.py").write_text(STORY)
    return str(tmp_path / "plan.toml"), f"{tmp_path / 'story.py'}:story"


async def launched(seed: int) -> dict[str, str]:
    """What a machine that this program launches does."""
    space: dict[str, object] = {}
    exec(STORY, space)
    async with hmmnet.launch("two-gpus", rate=1.0, seed=seed, faults=Plan.parse(PLAN)) as machine:
        return await space["story"](machine)  # type: ignore[operator,no-any-return] # the function of the text


def facts(*command: str) -> dict[str, str]:
    """What `hmmnet run` printed of the story."""
    done = hmmnet_command("run", *command, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    return {"jobs": shown["jobs"], "homes": shown["homes"]}


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What a machine that this program launches does with seed 7."""
    done = trio.run(launched, 7)
    assert {*done["jobs"]} == {*done["homes"]} == {".", "x"}
    return done


def test_a_run_with_the_same_seed_breaks_the_same(files: tuple[str, str], expected: dict[str, str]) -> None:
    """As a machine that a program launches."""
    plan, story = files
    assert facts(story, "--faults", plan, "--seed", "7", "--rate", "1") == expected


def test_with_another_seed_it_is_another_story(files: tuple[str, str], expected: dict[str, str]) -> None:
    """In the host, and in a device."""
    plan, story = files
    other = facts(story, "--faults", plan, "--seed", "8", "--rate", "1")
    assert other["jobs"] != expected["jobs"]
    assert other["homes"] != expected["homes"]


def test_a_machine_that_is_up_breaks_the_same(files: tuple[str, str], expected: dict[str, str]) -> None:
    """In the foreground."""
    plan, story = files
    with up("--faults", plan, "--seed", "7"):
        assert facts(story, "--on", "default") == expected


def test_a_machine_in_the_background_breaks_the_same(files: tuple[str, str], expected: dict[str, str]) -> None:
    """The seed is handed on to the process that stays."""
    plan, story = files
    assert hmmnet_command("up", "--detach", "--rate", "1", "--faults", plan, "--seed", "7").returncode == 0
    try:
        assert facts(story, "--on", "default") == expected
    finally:
        hmmnet_command("down")
