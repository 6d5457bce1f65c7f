"""Built-in workloads: right results are called right, wrong ones wrong, and the work is shared."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hmmnet.workloads.pointers import list_walk, tree_search
from hmmnet.workloads.registry import UnknownWorkload, load_workload, workload_names
from hmmnet.workloads.shares import cut
from hmmnet.workloads.text import cut_text, load_text, plain_counts, plain_hash, word_count
from hmmnet.workloads.vector import reduction, vector_add
from tests.flat_machine import FlatMachine


@pytest.fixture
def machine() -> FlatMachine:
    return FlatMachine()


SMALL: list[tuple[Any, dict[str, Any]]] = [
    (vector_add, {"n": 20_000}),
    (reduction, {"n": 20_000}),
    (list_walk, {"n": 9000, "nodes": 12_000}),
    (tree_search, {"n": 8500, "keys": 200}),
    (word_count, {"limit": 50_000}),
]
EACH = pytest.mark.parametrize(("workload", "arguments"), SMALL, ids=lambda x: getattr(x, "__name__", ""))


@EACH
async def test_a_right_result_on_both_devices(workload: Any, arguments: dict[str, Any], machine: Any) -> None:
    """Checked, reported as JSON, and the process is gone at the end."""
    report = await workload(machine, **arguments)
    assert (report["workload"], report["correct"], report["mistakes"]) == (workload.__name__, True, [])
    assert set(report["devices"]) == {"gpu0", "gpu1"}
    assert {device for _, device, _ in machine.launched} == {"gpu0", "gpu1"}
    assert machine.processes[0].exited
    json.dumps(report)


@EACH
async def test_a_wrong_result_is_said_to_be_wrong(workload: Any, arguments: dict[str, Any], machine: Any) -> None:
    """A device that is off by one does not pass."""
    machine.error = 1
    report = await workload(machine, **arguments)
    assert not report["correct"]
    assert report["mistakes"]


@EACH
async def test_one_device_remote(workload: Any, arguments: dict[str, Any], machine: Any) -> None:
    """Devices by name and the placement are passed on."""
    report = await workload(machine, devices="gpu1", placement="remote", **arguments)
    assert report["correct"]
    assert machine.launched == [(workload.__name__, "gpu1", "remote")]


@EACH
async def test_a_lost_device_gets_no_share(workload: Any, arguments: dict[str, Any], machine: Any) -> None:
    """Unless it is named; with all of them lost, that is said."""
    machine.lost = {"gpu0"}
    assert (await workload(machine, **arguments))["correct"]
    assert {device for _, device, _ in machine.launched} == {"gpu1"}
    await workload(machine, devices="gpu0", **arguments)
    assert machine.launched[-1][1] == "gpu0"
    machine.lost = {"gpu0", "gpu1"}
    with pytest.raises(ValueError, match="all devices of this machine are lost: gpu0, gpu1; `hmmnet fault bounce DEVICE`"):
        await workload(machine, **arguments)


@pytest.mark.parametrize(
    ("workload", "arguments"),
    [
        (vector_add, {"n": 0}),
        (reduction, {"n": 0}),
        (list_walk, {"n": 0, "nodes": 0}),
        (list_walk, {"n": 1, "nodes": 1}),
        (tree_search, {"n": 5, "keys": 0}),
    ],
)
async def test_nearly_nothing(workload: Any, arguments: dict[str, Any], machine: Any) -> None:
    assert (await workload(machine, **arguments))["correct"]


async def test_unknown_device(machine: Any) -> None:
    with pytest.raises(ValueError, match="no device is called gpu7; this machine has gpu0, gpu1"):
        await vector_add(machine, devices="gpu7")


async def test_words_of_a_file(machine: Any, tmp_path: Path) -> None:
    """An input file, its count against Counter."""
    path = tmp_path / "text"
    path.write_text("one two two three_3 three_3 three_3\n" * 40)
    report = await word_count(machine, input=str(path))
    assert (report["correct"], report["words"], report["different_words"]) == (True, 240, 3)


def test_text_is_cut_between_words() -> None:
    """No word is counted by halves, whatever the number of shares."""
    text = b"alpha beta " * 50 + b"x" * 300 + b" gamma"
    for shares in range(1, 12):
        parts = [text[a:b] for a, b in cut_text(text, shares)]
        assert b"".join(parts) == text
        assert Counter(w for part in parts for w in re.findall(rb"\w+", part)) == Counter(re.findall(rb"\w+", text))
    assert cut_text(b"", 2) == []


def test_default_text_is_real_and_bounded() -> None:
    """The standard library, at most as much as asked for."""
    text = load_text(limit=100_000)
    assert len(text) == 100_000
    assert sum(plain_counts(text).values()) > 5000
    assert plain_hash(b"foobar") == 0x85944171F73967E8


def test_shares_begin_at_multiples() -> None:
    assert cut(1300, 2, 512) == [(0, 1024), (1024, 1300)]
    assert cut(100, 4, 512) == [(0, 100)]
    assert cut(0, 2, 512) == []


def test_registry() -> None:
    """The five of the project, by entry point; an unknown name gets a suggestion."""
    assert {"list_walk", "reduction", "tree_search", "vector_add", "word_count"} <= set(workload_names())
    assert load_workload("vector_add") is vector_add
    with pytest.raises(UnknownWorkload, match='did you mean "vector_add"'):
        load_workload("vectoradd")
