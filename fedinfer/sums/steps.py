"""What a ClientApp answers to the steps of a secure sum in which no row is used, and how it answers at all."""

import logging
from collections.abc import Callable, Mapping

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer.errors import FedinferError
from fedinfer.secagg.codec import Message as Frame
from fedinfer.secagg.codec import to_bytes
from fedinfer.secagg.round_messages import Quorum, Survivors
from fedinfer.sums.membership import Membership
from fedinfer.sums.messages import SumMessage, error_to_content, sum_from_content, sum_to_content

log = logging.getLogger("fedinfer.device")
MembershipOf = Callable[[Context], Membership]


def answer(message: Message, work: Callable[[RecordDict], RecordDict]) -> Message:
    """The answer to `message`; of an error the server is told the kind, and the device's log the rest."""
    try:
        content = work(message.content)
    except FedinferError as error:
        log.error("%s: %s", type(error).__name__, error)
        content = error_to_content(error)
    except Exception as error:
        # Flower would send the text of the exception to the server, and a text may hold a value of a row.
        log.exception("the task failed")
        content = error_to_content(error)
    return Message(content, reply_to=message)


def add_steps(app: ClientApp, membership_of: MembershipOf) -> None:
    """Let `app` answer set-up, signing and revealing as the member that a context stands for."""

    def say(
        message: Message, context: Context, step: Callable[[Membership, SumMessage], Mapping[str, Frame]]
    ) -> Message:
        def work(content: RecordDict) -> RecordDict:
            said = sum_from_content(content)
            frames = {name: to_bytes(made) for name, made in step(membership_of(context), said).items()}
            return sum_to_content(SumMessage(run=said.run, frames=frames))

        return answer(message, work)

    @app.query("offer")
    def offer(message: Message, context: Context) -> Message:
        """Begin the set-up of a session."""
        return say(message, context, lambda member, said: {"commit": member.offer(said.run)})

    @app.query("open")
    def open_(message: Message, context: Context) -> Message:
        """Show this member's randomness for the roster."""
        return say(message, context, lambda member, said: {"opening": member.open(said.run, said.frame("roster"))})

    @app.query("share")
    def share(message: Message, context: Context) -> Message:
        """Enter the session, or come back to it: an offer for a round."""
        return say(
            message,
            context,
            lambda member, said: {"offer": member.share(said.run, said.frames.get("openings"), said.round)},
        )

    @app.query("sign")
    def sign(message: Message, context: Context) -> Message:
        """Sign who is in the sum."""
        return say(
            message,
            context,
            lambda member, said: {"endorsement": member.sign(said.run, said.read("survivors", Survivors))},
        )

    @app.query("reveal")
    def reveal(message: Message, context: Context) -> Message:
        """Show the shares that take the masks off the sum."""
        return say(
            message, context, lambda member, said: {"reveal": member.reveal(said.run, said.read("quorum", Quorum))}
        )
