"""Work on all cores: processes that end with this one, whatever becomes of it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

# Each holds an interpreter with torch of its own.
MOST_WORKERS = 8


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """A pool of new processes, one for each core and at most `MOST_WORKERS`; what has not begun at the end is dropped.

    They are not forked, because threads of this process may hold locks that nobody in a fork would open again.
    """
    count = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Ctrl-C comes when this is over; processes that are started meanwhile never get it.

    A terminal sends it to all of them, and only this one knows what to do.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
