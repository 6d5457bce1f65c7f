"""Who waits for whom when nothing moves: the wait-for graph of all tasks of a simulated machine, and its cycle.

Every task of host and devices is in this process, so each can be asked where it stands (its frames) and what it holds there. Edges:

- a task that waits for an **mmap lock** waits for those whose frames are inside a migration or fault of that address space;
- a task that waits for a **migration entry** waits for the task that migrates pages of that process;
- a task that waits for an **answer** waits for the peer's task that serves that request;
- a task that waits for a **transfer** waits for the other end of the stream;
- a task that is held at a **point** waits for the fault that holds it there.

Names come from the code itself, so that the story reads as the code does.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FrameType
from typing import Any

import trio

FRAMES_SHOWN = 4
TASKS_SHOWN = 24


@dataclass(frozen=True)
class Waiting:
    """One task: its name, its frames from the outside in, and what it waits for, as a key, and in words."""

    name: str
    frames: list[FrameType]
    key: tuple[str, Any] | None
    what: str

    @property
    def place(self) -> str:
        """Where it stands."""
        shown = [frame for frame in self.frames if "hmmnet" in frame.f_globals.get("__name__", "")][-FRAMES_SHOWN:]
        return " > ".join(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name for frame in shown)


def wait_story() -> str:
    """The cycle of who waits for whom, if there is one, and every task that waits for something."""
    return "\n".join(waits() or ["nobody waits for anybody"])


def waits() -> list[str]:
    """The lines of `wait_story`; none when nobody waits for anything."""
    waiting = [task for task in map(_look, all_tasks()) if task.key is not None]
    edges = {i: [j for j, other in enumerate(waiting) if j != i and _holds(other, task.key)] for i, task in enumerate(waiting)}
    lines = []
    cycle = find_cycle(edges)
    if cycle:
        lines.append("a cycle of waits:")
        lines += [f"  {waiting[i].name} waits for {waiting[i].what}, which the next one has ({waiting[i].place})" for i in cycle]
    if waiting:
        lines.append("who waits:")
    return lines + [f"  {task.name}: {task.what} ({task.place})" for task in waiting[:TASKS_SHOWN]]


def find_cycle(edges: dict[int, list[int]]) -> list[int]:
    """A cycle of a graph, or nothing."""
    done: set[int] = set()
    for start in edges:
        path: list[int] = []
        found = _walk(start, edges, path, done)
        if found:
            return found
    return []


def _walk(node: int, edges: dict[int, list[int]], path: list[int], done: set[int]) -> list[int]:
    if node in path:
        return path[path.index(node) :]
    if node in done:
        return []
    path.append(node)
    for following in edges.get(node, []):
        found = _walk(following, edges, path, done)
        if found:
            return found
    path.pop()
    done.add(node)
    return []


def all_tasks() -> list[trio.lowlevel.Task]:
    """Every task of this trio run."""
    root = trio.lowlevel.current_root_task()
    found, left = [], [] if root is None else [root]
    while left:
        task = left.pop()
        found.append(task)
        for nursery in task.child_nurseries:
            left += nursery.child_tasks
    return found


def _look(task: trio.lowlevel.Task) -> Waiting:
    frames = [frame for frame, _ in task.iter_await_frames()]
    key, what = None, ""
    for frame in reversed(frames):
        key, what = _waits_for(frame)
        if key is not None:
            break
    return Waiting(task.name.rpartition(".")[2], frames, key, what)


def _waits_for(frame: FrameType) -> tuple[tuple[str, Any] | None, str]:
    """What a frame waits for."""
    name, module = frame.f_code.co_name, str(frame.f_globals.get("__name__", ""))
    this = frame.f_locals.get("self")
    if name == "wait" and module.endswith("mm.locks"):
        if "writer" in frame.f_locals:
            return ("lock", id(this)), f"an mmap lock for {'writing' if frame.f_locals['writer'] else 'reading'}"
        return ("gate", id(this)), "a migration entry to be replaced"
    if name in {"request", "ask"} and module.endswith("wire.session"):
        message = type(frame.f_locals.get("message")).__name__
        return ("answer", (getattr(this, "peer_name", ""), message)), f"{getattr(this, 'peer_name', '')} to answer {message}"
    if name == "finish" and module.endswith("host.link"):
        return ("answer", (getattr(this, "name", ""), "Invalidate")), "an acknowledgement of an invalidation"
    if (name in {"receive", "expected"} and "fabric" in module) or (name == "send" and module.endswith("fabric.sender")):
        return ("stream", frame.f_locals.get("stream")), f"stream {frame.f_locals.get('stream')}"
    if name == "at" and module.endswith("faults.injector") and "where" in frame.f_locals:
        where = frame.f_locals["where"]
        return ("point", id(this)), f"a fault to let go of {where}"
    if name == "hold" and module.endswith("devices.locks"):
        return ("turn", id(this)), "its turn on a range of pages"
    return None, ""


def _holds(task: Waiting, key: tuple[str, Any] | None) -> bool:
    """Whether a task has what `key` names."""
    if key is None:
        return False
    kind, which = key
    for frame in task.frames:
        if not str(frame.f_globals.get("__name__", "")).startswith("hmmnet"):
            continue  # a program's own names may mean anything
        this = frame.f_locals.get("self")
        spaces = (frame.f_locals.get("space"), getattr(this, "space", None), this if hasattr(this, "mmap_lock") else None)
        space = next((space for space in spaces if space is not None), None)
        if kind == "lock" and id(getattr(space, "mmap_lock", None)) == which and task.key != key:
            return True
        if kind == "gate" and id(getattr(space, "_gate", None)) == which and "migrate" in frame.f_code.co_name:
            return True
        if kind == "answer" and frame.f_code.co_name == "_finish" and type(frame.f_locals.get("body")).__name__ == which[1]:
            return True
        if kind == "stream" and which is not None and frame.f_locals.get("stream") == which and task.key != key:
            return True
    return False
