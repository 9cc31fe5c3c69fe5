"""The Flower ClientApp: hands each message to the device, and tells the server of an error only its kind."""

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedinfer.errors import FedinferError
from fedinfer.flower import error_to_content, reply_to_content, task_from_content

from .sdk import DeviceConfig, open_device

log = logging.getLogger("fedinfer.device")
app = ClientApp()


@app.train("step")
def step(message: Message, context: Context) -> Message:
    """One round of training."""
    try:
        device = open_device(DeviceConfig.from_node(context.node_config))
        content = reply_to_content(device.step(task_from_content(message.content)))
    except FedinferError as error:
        log.error("%s: %s", type(error).__name__, error)
        content = error_to_content(error)
    except Exception as error:
        # Flower would send the text of the exception to the server, and a text may hold a value of a row.
        log.exception("the step failed")
        content = error_to_content(error)
    return Message(content, reply_to=message)
