"""The Flower ClientApp: hands each message to the device, and tells the server of an error only its kind.

The device, and torch with it, is loaded by the messages that use rows: a SuperNode starts a process for each message.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer.secagg.codec import to_bytes
from fedinfer.secagg.round_messages import Inbox
from fedinfer.sums.membership import open_membership
from fedinfer.sums.messages import SumMessage, sum_from_content, sum_to_content
from fedinfer.sums.steps import add_steps, answer

if TYPE_CHECKING:
    from .sdk import Device, SumTask

app = ClientApp()
add_steps(app, lambda context: open_membership(context.node_config))


@app.train("step")
def step(message: Message, context: Context) -> Message:
    """One round of training."""
    from fedinfer.flower import reply_to_content, task_from_content

    return _answer(message, context, lambda device, task: reply_to_content(device.step(task_from_content(task))))


@app.evaluate("counts")
def counts(message: Message, context: Context) -> Message:
    """One evaluation, as noised counts."""
    from fedinfer.flower import counts_to_content, evaluation_from_content

    return _answer(
        message, context, lambda device, task: counts_to_content(device.evaluate(evaluation_from_content(task)))
    )


@app.train("masked")
def masked(message: Message, context: Context) -> Message:
    """One round of training by a secure sum."""
    from fedinfer.flower import task_from_content

    return _answer(message, context, lambda device, task: _masked(device, task, task_from_content(task)))


@app.evaluate("masked")
def counted(message: Message, context: Context) -> Message:
    """One evaluation by a secure sum."""
    from fedinfer.flower import evaluation_from_content

    return _answer(message, context, lambda device, task: _masked(device, task, evaluation_from_content(task)))


@app.query("masked")
def histograms(message: Message, context: Context) -> Message:
    """Histograms of every feature by a secure sum."""
    from fedinfer.flower import histograms_from_content

    return _answer(message, context, lambda device, task: _masked(device, task, histograms_from_content(task)))


def _masked(device: "Device", content: RecordDict, task: "SumTask") -> RecordDict:
    reply = device.masked(task, sum_from_content(content).read("inbox", Inbox))
    frames = {"masked": to_bytes(reply.masked), "offer": to_bytes(reply.offer)}
    return sum_to_content(SumMessage(run=task.run, frames=frames), void=reply.void)


def _answer(message: Message, context: Context, work: "Callable[[Device, RecordDict], RecordDict]") -> Message:
    from .sdk import DeviceConfig, open_device

    return answer(message, lambda content: work(open_device(DeviceConfig.from_node(context.node_config)), content))
