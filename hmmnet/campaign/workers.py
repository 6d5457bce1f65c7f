"""Processes that runs are handed to; and how they end when somebody wants no more."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children

from hmmnet.lifeline import die_with_parent


def _begin(initializer: Callable[[], None]) -> None:
    """Nobody kills the workers of one who was killed: the kernel does."""
    die_with_parent()
    initializer()


def _nothing() -> None:
    """The first work: a pool starts nobody before there is some."""


@contextmanager
def workers(jobs: int, initializer: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    """A pool of `jobs` processes while the block runs.

    What an exception ends, Ctrl-C for one, is over at once: a pool would let each worker finish what it has, and what it took in advance.
    Workers hear no Ctrl-C themselves, which comes to all processes of a terminal: they are started, or their fork server is, with
    signals blocked. Here it waits until they are: Python passes over what is raised while it forks.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(jobs, initializer=_begin, initargs=(initializer,))
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            pool.submit(_nothing)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield pool
    except BaseException:
        for child in set(active_children()) - others:
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
