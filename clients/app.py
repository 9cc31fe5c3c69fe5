"""The Flower ClientApp: hands each message to the device, and tells the server of an error only its kind."""

import logging
from collections.abc import Callable, Mapping

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer.errors import FedinferError
from fedinfer.evaluating import EvaluationTask
from fedinfer.flower import (
    counts_to_content,
    error_to_content,
    evaluation_from_content,
    reply_to_content,
    task_from_content,
)
from fedinfer.flower_sums import SumMessage, sum_from_content, sum_to_content
from fedinfer.secagg.codec import Message as SumFrame
from fedinfer.secagg.codec import to_bytes
from fedinfer.secagg.round_messages import Inbox, Quorum, Survivors
from fedinfer.training import StepTask

from .membership import Membership
from .sdk import Device, DeviceConfig, open_device

log = logging.getLogger("fedinfer.device")
app = ClientApp()


@app.train("step")
def step(message: Message, context: Context) -> Message:
    """One round of training."""
    return _answer(message, context, lambda device, task: reply_to_content(device.step(task_from_content(task))))


@app.train("masked")
def masked(message: Message, context: Context) -> Message:
    """One round of training by a secure sum."""
    return _answer(message, context, lambda device, task: _masked(device, task, task_from_content(task)))


@app.evaluate("masked")
def counted(message: Message, context: Context) -> Message:
    """One evaluation by a secure sum."""
    return _answer(message, context, lambda device, task: _masked(device, task, evaluation_from_content(task)))


@app.query("offer")
def offer(message: Message, context: Context) -> Message:
    """Begin the set-up of a session of secure sums."""
    return _say(message, context, lambda member, said: {"commit": member.offer(said.run)})


@app.query("open")
def open_(message: Message, context: Context) -> Message:
    """Show this member's randomness for the roster."""
    return _say(message, context, lambda member, said: {"opening": member.open(said.run, said.frame("roster"))})


@app.query("share")
def share(message: Message, context: Context) -> Message:
    """Enter the session, or come back to it: an offer for a round."""
    return _say(
        message,
        context,
        lambda member, said: {"offer": member.share(said.run, said.frames.get("openings"), said.round)},
    )


@app.query("sign")
def sign(message: Message, context: Context) -> Message:
    """Sign who is in the sum."""
    return _say(
        message, context, lambda member, said: {"endorsement": member.sign(said.run, said.read("survivors", Survivors))}
    )


@app.query("reveal")
def reveal(message: Message, context: Context) -> Message:
    """Show the shares that take the masks off the sum."""
    return _say(message, context, lambda member, said: {"reveal": member.reveal(said.run, said.read("quorum", Quorum))})


@app.evaluate("counts")
def counts(message: Message, context: Context) -> Message:
    """One evaluation, as noised counts."""
    return _answer(
        message, context, lambda device, task: counts_to_content(device.evaluate(evaluation_from_content(task)))
    )


def _masked(device: Device, content: RecordDict, task: StepTask | EvaluationTask) -> RecordDict:
    reply = device.masked(task, sum_from_content(content).read("inbox", Inbox))
    frames = {"masked": to_bytes(reply.masked), "offer": to_bytes(reply.offer)}
    return sum_to_content(SumMessage(run=task.run, frames=frames), void=reply.void)


def _say(
    message: Message, context: Context, step: Callable[[Membership, SumMessage], Mapping[str, SumFrame]]
) -> Message:
    """Answer a step of the protocol in which no row is used."""

    def work(device: Device, content: RecordDict) -> RecordDict:
        said = sum_from_content(content)
        frames = {name: to_bytes(made) for name, made in step(device.membership, said).items()}
        return sum_to_content(SumMessage(run=said.run, frames=frames))

    return _answer(message, context, work)


def _answer(message: Message, context: Context, work: Callable[[Device, RecordDict], RecordDict]) -> Message:
    try:
        content = work(open_device(DeviceConfig.from_node(context.node_config)), message.content)
    except FedinferError as error:
        log.error("%s: %s", type(error).__name__, error)
        content = error_to_content(error)
    except Exception as error:
        # Flower would send the text of the exception to the server, and a text may hold a value of a row.
        log.exception("the task failed")
        content = error_to_content(error)
    return Message(content, reply_to=message)
