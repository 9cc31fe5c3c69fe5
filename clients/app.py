"""The Flower ClientApp: hands each message to the device, and tells the server of an error only its kind."""

import logging
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer.errors import FedinferError
from fedinfer.flower import (
    counts_to_content,
    error_to_content,
    evaluation_from_content,
    reply_to_content,
    task_from_content,
)

from .sdk import Device, DeviceConfig, open_device

log = logging.getLogger("fedinfer.device")
app = ClientApp()


@app.train("step")
def step(message: Message, context: Context) -> Message:
    """One round of training."""
    return _answer(message, context, lambda device, task: reply_to_content(device.step(task_from_content(task))))


@app.evaluate("counts")
def counts(message: Message, context: Context) -> Message:
    """One evaluation, as noised counts."""
    return _answer(
        message, context, lambda device, task: counts_to_content(device.evaluate(evaluation_from_content(task)))
    )


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
