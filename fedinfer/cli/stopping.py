"""Ctrl-C: where a run stops, and the one line that says how it goes on."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedinfer.cli.parts import part
from fedinfer.errors import CheckpointError
from fedinfer.settings import RunConfig


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], None]]:
    """The first Ctrl-C lets a step end, such as a round, so that no release is repeated; the second interrupts at once.

    The value is to be called between steps: it raises KeyboardInterrupt if Ctrl-C was pressed. Raised anywhere, it may
    be lost where compiled code asks Python something and clears any error.
    """
    asked = False

    def ask(signal_number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # A handler may run inside a write to standard error, which Python does not let it enter again.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopping after this step; Ctrl-C again: now\n")

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def before_rounds(check: Callable[[], None]) -> Callable[[str], None]:
    """Call `check` before the first wave of messages of each round; the value is to be told each wave's group id.

    A round of secure sums is several waves, of which the first is named by the round and charges the ledgers: stopped
    before the others, it would be charged a second time. So would a sum that fails and is asked for again.
    """
    begun = ""

    def before(group: str) -> None:
        nonlocal begun
        if group.isdigit() and group != begun:
            check()
            begun = group

    return before


def way_on(config: RunConfig, command: str) -> str:
    """What an interrupted run left on the disk, and that `command` goes on from there."""
    try:
        state = part("server.checkpoint").load_checkpoint(Path(config.checkpoint), config_digest=config.digest())
    except CheckpointError:
        state = None
    if state is None or state.run != config.run:
        return "stopped before the first round; nothing was spent"
    return f"stopped; {config.checkpoint} holds round {state.round} of {config.rounds}: {command} goes on"
