"""What a grid can tell of a round under any server: a wave of training messages and its answers."""

from collections.abc import Sequence

from flwr.app import Message

from fedinfer.simulation.callbacks import Callback, RoundLog, tell
from fedinfer.simulation.engines import CohortSum
from fedinfer.simulation.meter import is_training


class Waves:
    """Tells `callbacks` of each wave of messages that ask for training; the number of the wave is the round."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = callbacks
        self._round = 0

    def begin(self) -> None:
        """The run begins."""
        for callback in self._callbacks:
            callback.begin(0)

    def answered(self, replies: Sequence[Message], *, asked: Sequence[str], seconds: float) -> None:
        """Messages of the types `asked` have had their answers, as many as came in time."""
        if any(map(is_training, asked)):
            good = sum(reply.has_content() for reply in replies)
            self._tell(
                RoundLog(
                    round=self._round + 1, clients=len(asked), replies=good, errors=len(replies) - good, seconds=seconds
                )
            )

    def summed(self, total: CohortSum, *, asked: int, seconds: float) -> None:
        """A cohort has been summed."""
        self._tell(
            RoundLog(
                round=self._round + 1,
                clients=asked,
                replies=total.replies,
                errors=len(total.errors),
                seconds=seconds,
                loss=total.loss,
            )
        )

    def end(self) -> None:
        """The run is over, or failed."""
        for callback in self._callbacks:
            callback.end()

    def _tell(self, record: RoundLog) -> None:
        self._round = record.round
        tell(self._callbacks, record)
