"""The Flower ClientApp: hands each message to the device, and tells the server of an error only its kind."""

from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer.evaluating import EvaluationTask
from fedinfer.flower import counts_to_content, evaluation_from_content, reply_to_content, task_from_content
from fedinfer.secagg.codec import to_bytes
from fedinfer.secagg.round_messages import Inbox
from fedinfer.sums.messages import SumMessage, sum_from_content, sum_to_content
from fedinfer.sums.steps import add_steps, answer
from fedinfer.training import StepTask

from .sdk import Device, DeviceConfig, open_device

app = ClientApp()


@app.train("step")
def step(message: Message, context: Context) -> Message:
    """One round of training."""
    return _answer(message, context, lambda device, task: reply_to_content(device.step(task_from_content(task))))


@app.train("masked")
def masked(message: Message, context: Context) -> Message:
    """One round of training by a secure sum."""
    return _answer(message, context, lambda device, task: _masked(device, task, task_from_content(task)))


@app.evaluate("counts")
def counts(message: Message, context: Context) -> Message:
    """One evaluation, as noised counts."""
    return _answer(
        message, context, lambda device, task: counts_to_content(device.evaluate(evaluation_from_content(task)))
    )


@app.evaluate("masked")
def counted(message: Message, context: Context) -> Message:
    """One evaluation by a secure sum."""
    return _answer(message, context, lambda device, task: _masked(device, task, evaluation_from_content(task)))


add_steps(app, lambda context: _device(context).membership)


def _masked(device: Device, content: RecordDict, task: StepTask | EvaluationTask) -> RecordDict:
    reply = device.masked(task, sum_from_content(content).read("inbox", Inbox))
    frames = {"masked": to_bytes(reply.masked), "offer": to_bytes(reply.offer)}
    return sum_to_content(SumMessage(run=task.run, frames=frames), void=reply.void)


def _device(context: Context) -> Device:
    return open_device(DeviceConfig.from_node(context.node_config))


def _answer(message: Message, context: Context, work: Callable[[Device, RecordDict], RecordDict]) -> Message:
    return answer(message, lambda content: work(_device(context), content))
