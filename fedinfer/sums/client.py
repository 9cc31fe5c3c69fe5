"""An existing ClientApp behind a secure sum: its update is clipped, noised and masked before it leaves.

    app = secure(app)

The app's own function for "train" is called as before, with the message that its author expects; of its reply only
the arrays count. Unit of privacy: the whole client. The device charges its own ledger before the function is called.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer.errors import BadUsage, UnprotectedRefused, WireError
from fedinfer.privacy import DistributedPlan, PrivacyLedger, os_noise
from fedinfer.privacy.clipping import clip_update
from fedinfer.privacy.heads import HeadFile
from fedinfer.secagg import SumSpec, Words
from fedinfer.secagg.codec import to_bytes
from fedinfer.secagg.round_messages import Inbox
from fedinfer.sums.charges import check_charge
from fedinfer.sums.membership import open_membership, simulated_file
from fedinfer.sums.messages import SUM, SumMessage, sum_from_content, sum_to_content
from fedinfer.sums.steps import add_steps, answer
from fedinfer.sums.updates import Floats, arrays_of, content_digest, floats_in, update_of

PLAN, ARRAYS = "fedinfer-plan", "arrays"


def secure(app: ClientApp) -> ClientApp:
    """A ClientApp that takes part in secure sums with the updates of `app`, and answers nothing else.

    The node configuration says who the device is, beside what `app` itself reads there: `ledger` (and `ledger-head`,
    `ledger-public-key`), `pki`, `pki-digest`, `identity`, and `sessions`, `corrupt`, `dropout` if not the defaults.

    Guarantees: what leaves the device of its data is, to the server and to at most `Parameters.corrupt` other members,
    a part of a sum with the noise of `DistributedPlan`; it is in the ledger before `app` is called. Metrics of a reply,
    and the number of examples, stay on the device; "train" and "evaluate" without a secure sum are refused.
    """
    wrapped = ClientApp()
    add_steps(wrapped, lambda context: open_membership(context.node_config))

    @wrapped.train("masked")
    def masked(message: Message, context: Context) -> Message:
        def work(content: RecordDict) -> RecordDict:
            return _masked(app, message, content, context)

        return answer(message, work)

    @wrapped.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, _refuse)

    @wrapped.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, _refuse)

    return wrapped


def _refuse(content: RecordDict) -> RecordDict:
    raise UnprotectedRefused(
        "message: got one that asks for a single device's answer, expected a step of a secure sum; let the server use "
        "SecureFedAvg, and evaluate on data of its own"
    )


def _masked(app: ClientApp, message: Message, content: RecordDict, context: Context) -> RecordDict:
    """Check, reserve, train, clip, noise, mask, commit."""
    said, plan, round = sum_from_content(content), *_plan_in(content)
    inbox = said.read("inbox", Inbox)
    spec, model = SumSpec(length=plan.padded, bits=plan.bits), content_digest(content)
    with open_membership(context.node_config).participant(said.run) as participant, _ledger(context) as ledger:
        check_charge(plan, participant.session.parameters)
        participant.check(inbox, spec=spec, model=model)
        size = len(floats_in(arrays_of(content.array_records[ARRAYS])))
        if size != plan.dimension:
            raise WireError(f"plan: got one for {plan.dimension} weights, expected {size}")
        stream = os_noise()
        reservation = ledger.reserve(run=said.run, round=round, plan=plan, void=stream.void)
        update = _update(app, message, content, context)
        with np.errstate(over="ignore"):
            clipped = clip_update(update.astype(np.float32), clip_norm=plan.clip_norm)
        vector: Words = plan.encode(clipped, stream, rotation=f"round {round}")
        frames = {"masked": to_bytes(participant.masked(inbox, vector, spec=spec, model=model))}
        ledger.commit(reservation)
        frames["offer"] = to_bytes(participant.offer(inbox.round + 1))
    return sum_to_content(SumMessage(run=said.run, frames=frames), void=stream.void)


def _update(app: ClientApp, message: Message, content: RecordDict, context: Context) -> Floats:
    """What the app's own training changes, in floats (d,)."""
    before = arrays_of(content.array_records[ARRAYS])
    own = RecordDict({name: record for name, record in content.items() if name not in (SUM, PLAN)})
    kind = message.metadata.message_type
    try:
        message.content, message.metadata.message_type = own, "train"
        reply = app(message, context)
    finally:
        message.content, message.metadata.message_type = content, kind
    if reply.has_error() or len(reply.content.array_records) != 1:
        raise WireError("the app's reply: got an error, or not one ArrayRecord, expected the trained arrays")
    (after,) = reply.content.array_records.values()
    return update_of(before, arrays_of(after))


def _plan_in(content: RecordDict) -> tuple[DistributedPlan, int]:
    """The plan of a sum and its round.

    Raises: WireError if there is none; UnprotectedRefused if it protects something else than whole clients.
    """
    record = content.get(PLAN)
    if not isinstance(record, ConfigRecord) or ARRAYS not in content.array_records:
        raise WireError(f"message: got no {PLAN!r} or no {ARRAYS!r}, expected one of SecureFedAvg")
    text, round = record.get("plan"), record.get("round")
    if type(text) is not str or type(round) is not int or round < 1:
        raise WireError(f"{PLAN}: got a field of another type, expected the plan as JSON and a round")
    try:
        values = json.loads(text)
    except ValueError:
        raise WireError(f"{PLAN}: got no JSON") from None
    if not isinstance(values, Mapping):
        raise WireError(f"{PLAN}: got no JSON object")
    plan = DistributedPlan.from_json(values)
    if plan.unit != "client":
        raise UnprotectedRefused("plan: got one for single examples, expected whole clients; their updates are summed")
    return plan, round


def _ledger(context: Context) -> PrivacyLedger:
    node = context.node_config
    place = node.get("ledger") or simulated_file(node, "ledger")
    if not place:
        raise BadUsage(
            'node configuration: got no ledger, expected ledger="PATH"; make one with `fedinfer ledger init PATH '
            "--epsilon E --delta D`"
        )
    for pin in ("ledger-head", "ledger-public-key"):
        if pin in node and not node[pin]:
            raise BadUsage(f'node configuration: got {pin}="", expected a value; leave the key out to pin nothing')
    head = HeadFile(Path(str(node["ledger-head"])).absolute()) if "ledger-head" in node else None
    key = str(node["ledger-public-key"]) if "ledger-public-key" in node else None
    return PrivacyLedger.open(Path(str(place)), head=head, public_key=key)
