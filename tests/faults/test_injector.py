"""Injectors: what can be asked of a point, and what a point costs nobody who asks nothing."""

from __future__ import annotations

import pytest
import trio

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.faults import POINTS, Controls, Injector, PointFault, Points


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"point": "migrate.before_copie", "action": "delay"},
            'no point is called "migrate.before_copie"; did you mean "migrate.before_copy"?',
        ),
        ({"point": "host.alloc.frame", "action": "pause"}, 'nothing can pause at "host.alloc.frame"'),
        ({"point": "migrate.*", "action": "explode"}, 'no action is called "explode"'),
        ({"point": "migrate.*", "action": "call"}, "a function goes with"),
        ({"point": "migrate.*", "action": "delay", "call": print}, "a function goes with"),
        ({"point": "migrate.*", "action": "delay", "delay_s": -1.0}, "cannot be"),
    ],
)
def test_what_cannot_be_is_said(arguments: dict[str, object], message: str) -> None:
    """Before anything runs, with what was probably meant."""
    with pytest.raises(HmmnetError, match=message.replace("*", r"\*").replace("?", r"\?")):
        PointFault(**arguments)  # type: ignore[arg-type]


async def test_armed_only_while_somebody_asks() -> None:
    """A fault arms all nodes of its injector, and its end disarms them; so does recording."""
    injector = Injector()
    host, gpu0 = injector.points_of("host"), injector.points_of("gpu0")
    assert (host.armed, gpu0.armed) == (False, False)
    number = injector.add(PointFault("device.job_start", "fail"))
    assert (host.armed, gpu0.armed) == (True, True)
    with pytest.raises(KernelError, match="ENOMEM"):
        await gpu0.at("device.job_start")
    injector.remove(number)
    assert (host.armed, gpu0.armed) == (False, False)
    injector.record()
    await host.at("migrate.after", device="gpu0")
    injector.record(on=False)
    assert (host.armed, dict(injector.reached)) == (False, {"device.job_start": 1, "migrate.after": 1})
    later = injector.points_of("gpu1")
    assert not later.armed


async def test_what_may_happen_is_known_anew_after_every_change() -> None:
    """Which faults concern a point is remembered by point, node and device: what begins or ends later counts all the same."""
    injector = Injector()
    host, gpu0 = injector.points_of("host"), injector.points_of("gpu0")
    injector.record()
    await host.at("migrate.allocate", device="gpu0")
    number = injector.add(PointFault("migrate.all*", "fail", device="gpu1", process=7))
    for process, device in ((7, "gpu0"), (8, "gpu1")):
        await host.at("migrate.allocate", device=device, process=process)
    with pytest.raises(KernelError):
        await host.at("migrate.allocate", device="gpu1", process=7)
    injector.remove(number)
    await host.at("migrate.allocate", device="gpu1", process=7)
    assert (injector.reached["migrate.allocate"], len(injector.fired)) == (5, 1)
    injector.stop("gpu0")
    with trio.move_on_after(0.01) as scope:
        await gpu0.at("device.job_start")
    assert scope.cancelled_caught, "a node that hangs passes no point, even where no fault is"
    assert not injector.reached["device.job_start"]


async def test_a_point_that_nothing_concerns_is_passed_without_a_task() -> None:
    """And counted where points are; where something may happen, or the node hangs, somebody has to wait there."""
    injector = Injector()
    gpu0 = injector.points_of("gpu0")
    assert gpu0.passes("device.copy_in")
    assert not injector.reached, "nobody counts"
    number = injector.add(PointFault("device.copy_in", "delay", device="gpu1"))
    assert [gpu0.passes("device.copy_in", device) for device in (None, "gpu1")] == [True, False]
    injector.stop("gpu0")
    assert not gpu0.passes("device.copy_in")
    injector.remove(number)
    assert not gpu0.passes("device.copy_in"), "it hangs still"
    injector.resume("gpu0")
    assert gpu0.passes("device.copy_in")
    assert injector.reached == {"device.copy_in": 1}


async def test_the_nth_occurrence_and_no_other() -> None:
    """fail-nth, over all devices together."""
    injector = Injector()
    nodes = [injector.points_of(name) for name in ("gpu0", "gpu1")]
    injector.add(PointFault("device.alloc.small", "fail", controls=Controls(nth=3)))
    assert [node.fails("device.alloc.small") for _ in range(2) for node in nodes] == [False, False, True, False]


async def test_a_stopped_node_gets_no_further(autojump_clock: trio.testing.MockClock) -> None:
    """Until it is resumed; others go on."""
    injector = Injector()
    gpu0, gpu1 = injector.points_of("gpu0"), injector.points_of("gpu1")
    injector.stop("gpu0")
    await gpu1.at("device.job_step")
    with trio.move_on_after(1) as limit:
        await gpu0.at("device.job_step")
    assert limit.cancelled_caught
    injector.resume("gpu0")
    await gpu0.at("device.job_step")


async def test_who_cannot_kill_says_so() -> None:
    """An injector that belongs to no world."""
    injector = Injector()
    injector.add(PointFault("migrate.before_copy", "crash"))
    with pytest.raises(HmmnetError, match='nobody here can crash "gpu0"'):
        await injector.points_of("host").at("migrate.before_copy", device="gpu0")


async def test_a_host_does_not_crash_alone() -> None:
    """At a point that concerns no device it has to be said who is to, before anybody comes to it; patterns leave those points out."""
    lost: list[tuple[str, str]] = []
    injector = Injector(on_node=lambda action, node: lost.append((action, node)))
    host = injector.points_of("host")
    for point in ("hub.after_acks", "process.*", "session.bye"):
        with pytest.raises(HmmnetError, match="concerns no device; say which node is to hang"):
            PointFault(point, "hang")
    with pytest.raises(HmmnetError, match="no host can crash alone"):
        PointFault("hub.after_acks", "crash", node="host")
    number = injector.add(PointFault("*.before_*", "crash"))
    await host.at("hub.before_callbacks", process=1000)
    assert lost == []
    await host.at("home.before_copy", device="gpu0")
    assert lost == [("crash", "gpu0")]
    lost.clear()
    injector.remove(number)
    injector.add(PointFault("hub.after_acks", "crash", node="gpu1"))
    with trio.fail_after(1):
        await host.at("hub.after_acks", process=1000)
    assert lost == [("crash", "gpu1")]
    assert injector.fired[-1].node == "gpu1"


async def test_points_of_nobody_do_nothing() -> None:
    """What a host has that was given none."""
    points = Points()
    for name in POINTS:
        await points.at(name)
        assert not points.fails(name)
        assert not points.wants(name)
    assert not points.armed


async def test_what_happened_is_a_line_with_hexadecimal_pages() -> None:
    """As every other place that names pages."""
    injector = Injector()
    host = injector.points_of("host")
    injector.add(PointFault("migrate.before_copy", "delay", delay_s=1e-6))
    await host.at("migrate.before_copy", device="gpu0", process=1000, start=0x100000, pages=2)
    assert injector.fired[0].line == "fault delay migrate.before_copy node=host device=gpu0 process=1000 start=0x100000 pages=2"
