"""Processes that runs are handed to; and how they end when somebody wants no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children

from hmmnet.lifeline import die_with_parent


def _begin(initializer: Callable[[], None]) -> None:
    """Nobody kills the workers of one who was killed: the kernel does."""
    die_with_parent()
    initializer()


@contextmanager
def workers(jobs: int, initializer: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    """A pool of `jobs` processes while the block runs.

    What an exception ends, Ctrl-C for one, is over at once: a pool would let each worker finish what it has, and what it took in advance.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(jobs, initializer=_begin, initargs=(initializer,))
    try:
        yield pool
    except BaseException:
        for child in set(active_children()) - others:
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
