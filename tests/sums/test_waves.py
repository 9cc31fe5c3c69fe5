"""A wave: answers come one by one and are let go, and what is missing is said."""

import gc
import time
import weakref
from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer.simulation import InProcessGrid
from fedinfer.simulation.grid import _task_of
from fedinfer.sums.waves import Wave

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    number = int(context.node_config["partition-id"])
    if number == 3:
        return Message(RecordDict({"error": ConfigRecord({"kind": "BudgetExceeded"})}), reply_to=message)
    return Message(RecordDict({"arrays": ArrayRecord([np.full(1000, number)])}), reply_to=message)


class Trickling(InProcessGrid):
    """Hands over one answer at a time, and that to node 4 never."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for name in list(message_ids)[:1]:
            yield from (reply for reply in super().pull_messages([name]) if reply.metadata.src_node_id != self._last)

    @property
    def _last(self) -> int:
        return max(self.get_node_ids())


def test_answers_come_one_by_one_and_are_let_go() -> None:
    grid = Trickling(app, [{"partition-id": number} for number in range(5)], {})
    seen: list[weakref.ref[RecordDict]] = []
    started = time.monotonic()
    with _task_of(grid.run):
        messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        wave = Wave(grid, messages, timeout_s=0.3, name="a wave")
        numbers = []
        for _, content in wave:
            gc.collect()
            assert [ref for ref in seen if ref() is not None] == []
            numbers.append(int(content.array_records["arrays"].to_numpy_ndarrays()[0][0]))
            seen.append(weakref.ref(content))
            del content
    assert numbers == [0, 1, 2]
    assert wave.reasons() == "1 BudgetExceeded, 1 without an answer"
    assert list(wave.failures.values()) == ["BudgetExceeded"]
    assert wave.bytes_up > 3 * 8000
    assert 0.3 <= time.monotonic() - started < 5.0
