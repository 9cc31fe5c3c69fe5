"""Flower messages of a secure sum: frames of `fedinfer/secagg` in a ConfigRecord, and what they are about beside them.

- `query.offer`: → commit. The set-up, once for many rounds.
- `query.open`: roster → opening.
- `query.share`: openings → offer for the first round; without openings, an offer for a later round.
- `train.masked`, `evaluate.masked`, `query.masked`: task and inbox → masked vector, with the offer for the next round.
- `query.sign`: survivors → endorsement.
- `query.reveal`: quorum → reveal.

A device's answer to any message, of these or others, may be an error. This file is light: a SuperNode starts a process
for each message, and most steps of a sum need no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedinfer.errors import FedinferError, WireError
from fedinfer.secagg.codec import Message, from_bytes

OFFER, OPEN, SHARE = "query.offer", "query.open", "query.share"
MASKED, COUNTED, HISTOGRAMS = "train.masked", "evaluate.masked", "query.masked"
SIGN, REVEAL = "query.sign", "query.reveal"
SUM, VOID = "sum", "void"
# More than any message of a round of 2^26 weights.
MAX_FRAME_BYTES = 1 << 30
KIND = re.compile("[A-Za-z]{1,64}")

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, kw_only=True)
class SumMessage:
    """What a message of a secure sum holds: the run, a round where one is asked for, and frames by name."""

    run: str
    round: int = 0
    frames: Mapping[str, bytes]

    def frame(self, name: str) -> bytes:
        """The frame of this name.

        Raises: WireError if it is not there.
        """
        if name not in self.frames:
            raise WireError(f"sum message: got no {name!r}, expected one among the {len(self.frames)} frames")
        return self.frames[name]

    def read(self, name: str, kind: type[M]) -> M:
        """The message in the frame of this name.

        Raises: WireError if there is none, or it is another.
        """
        return from_bytes(kind, self.frame(name), max_bytes=MAX_FRAME_BYTES)


def sum_to_record(message: SumMessage) -> ConfigRecord:
    """The record of `message`, which lies under `SUM`."""
    return ConfigRecord({"run": message.run, "round": message.round, **message.frames})


def sum_to_content(message: SumMessage, *, void: bool = False) -> RecordDict:
    """A content that is `message` alone; `void` says that the noise in it was seeded."""
    return RecordDict({SUM: sum_to_record(message), VOID: MetricRecord({"void": int(void)})})


def sum_from_content(content: RecordDict) -> SumMessage:
    """Read the record under `SUM`.

    Raises: WireError if there is none.
    """
    try:
        fields = dict(content.config_records[SUM])
        run, round = fields.pop("run"), fields.pop("round")
        frames = {name: value for name, value in fields.items() if isinstance(value, bytes)}
        if type(run) is not str or type(round) is not int or len(frames) != len(fields):
            raise TypeError("a field of another type")
        return SumMessage(run=run, round=round, frames=frames)
    except (KeyError, TypeError) as error:
        raise WireError(f"sum message: expected a field or a type that is not there ({error})") from None


def void_in(content: RecordDict) -> bool:
    """Whether the noise of a masked vector was seeded, as its device says."""
    record = content.metric_records.get(VOID)
    return record is None or record.get("void") != 0


def error_to_content(error: BaseException) -> RecordDict:
    """What a device tells the server of an error: its kind, never its text, which may speak of rows or paths."""
    kind = type(error).__name__ if isinstance(error, FedinferError) else "InternalError"
    return RecordDict({"error": ConfigRecord({"kind": kind})})


def error_kind(content: RecordDict) -> str | None:
    """The kind of error in a device's answer, or None if it is not an error; it is a name, whatever the device sent."""
    record = content.config_records.get("error")
    if record is None:
        return None
    kind = record.get("kind")
    return kind if isinstance(kind, str) and KIND.fullmatch(kind) else "InternalError"
