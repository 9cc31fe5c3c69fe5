"""Sums come out exactly, or an error does: dropouts at every step, many rounds, over the wire."""

import copy
import os
import pickle
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer.errors import BadUsage, ProtocolViolation, RoundFailed, ShapeMismatch
from fedinfer.secagg.codec import Boxes, Message, from_bytes, to_bytes
from fedinfer.secagg.coordinator import Coordinator
from fedinfer.secagg.masks import SumSpec, Words
from fedinfer.secagg.newcomer import Newcomer
from fedinfer.secagg.parameters import Policy
from fedinfer.secagg.rehearsal import Rehearsal, make_pki, run_round, set_up
from fedinfer.secagg.round_messages import (
    Endorsement,
    Masked,
    Reveal,
    masked_said,
    max_bytes,
    offer_header,
    offer_said,
    reveal_said,
    survivors_said,
    vector_digest,
)
from fedinfer.secagg.session import agree, check_roster
from fedinfer.secagg.setup_messages import Openings, Roster

MODEL = bytes(range(32))
ROUNDS = count(1)


@cache
def rehearsal(clients: int, corrupt: float, dropout: float) -> Rehearsal:
    pki, identities = make_pki(clients)
    return set_up(pki=pki, identities=identities, policy=Policy(corrupt=corrupt, dropout=dropout), run=b"tests")


def vectors(clients: int, spec: SumSpec, seed: int) -> dict[int, Words]:
    random = np.random.default_rng(seed)
    return {n: random.integers(0, spec.bound, spec.length, endpoint=True).astype(spec.word) for n in range(clients)}


def refuses(step: Callable[[], object]) -> bool:
    try:
        step()
    except ProtocolViolation:
        return True
    return False


def expected_sum(inputs: dict[int, Words], missing: Collection[int], spec: SumSpec) -> list[int]:
    return [sum(int(v[i]) for n, v in inputs.items() if n not in missing) % 2**spec.bits for i in range(spec.length)]


# Complete graphs of 3 to 12 clients, with up to 50 % allowed to drop out.
SMALL = [(3, 0.0, 0.0), (4, 0.1, 0.25), (5, 0.0, 0.4), (8, 0.1, 0.3), (9, 0.0, 0.45), (12, 0.05, 0.41)]


@given(st.sampled_from(SMALL), st.data())
def test_any_dropouts_within_the_threshold_give_the_sum_and_any_others_raise(
    shape: tuple[int, float, float], data: st.DataObject
) -> None:
    clients = shape[0]
    here = rehearsal(*shape)
    parameters = here.coordinator.session.parameters
    spec = SumSpec(length=3, bits=data.draw(st.sampled_from([17, 20, 32, 48, 64])), bound=9000)
    some = st.sets(st.integers(0, clients - 1), max_size=clients // 2)
    none_or_some = st.one_of(st.just(set()), some)
    no_offer, no_masked, no_endorsement, no_reveal = (data.draw(none_or_some) for _ in range(4))
    inputs = vectors(clients, spec, data.draw(st.integers(0, 2**16)))

    active = set(range(clients)) - no_offer
    survivors = active - no_masked
    endorsers = survivors - no_endorsement
    revealers = endorsers - no_reveal
    works = (
        len(survivors) >= parameters.min_survivors
        and len(endorsers) >= parameters.quorum
        and all(len(revealers - {member}) >= parameters.threshold for member in active)
    )

    def play() -> list[int]:
        total = run_round(
            here,
            inputs,
            round=next(ROUNDS),
            spec=spec,
            model=MODEL,
            no_offer=no_offer,
            no_masked=no_masked,
            no_endorsement=no_endorsement,
            no_reveal=no_reveal,
        )
        return [int(value) for value in total]

    if works:
        assert play() == expected_sum(inputs, no_offer | no_masked, spec)
    else:
        with pytest.raises(RoundFailed):
            play()


@pytest.mark.parametrize("stage", ["no_offer", "no_masked", "no_endorsement", "no_reveal"])
@pytest.mark.parametrize("percent", [0, 10, 25, 40, 49, 50])
def test_dropouts_at_each_step(stage: str, percent: int) -> None:
    here = rehearsal(20, 0.0, 0.49)
    gone = set(range(20 * percent // 100))
    spec = SumSpec(length=5, bits=32, bound=1000)
    inputs = vectors(20, spec, percent)
    arguments = {"round": next(ROUNDS), "spec": spec, "model": MODEL, stage: gone}
    if percent == 50:
        with pytest.raises(RoundFailed):
            run_round(here, inputs, **arguments)
    else:
        missing = gone if stage in ("no_offer", "no_masked") else set()
        assert run_round(here, inputs, **arguments).tolist() == expected_sum(inputs, missing, spec)


@pytest.mark.parametrize("seed", range(3))
def test_a_sparse_graph_gives_the_same_sums(seed: int) -> None:
    here = rehearsal(100, 0.02, 0.05)
    session = here.coordinator.session
    assert max(len(near) for near in session.neighbours.values()) < 99
    random, spec = np.random.default_rng(seed), SumSpec(length=40, bits=24, bound=2**17)
    gone = [int(member) for member in random.choice(100, 5, replace=False)]
    inputs = vectors(100, spec, seed)
    total = run_round(
        here,
        inputs,
        round=next(ROUNDS),
        spec=spec,
        model=MODEL,
        no_offer=gone[:1],
        no_masked=gone[1:3],
        no_endorsement=gone[3:4],
        no_reveal=gone[4:],
    )
    assert total.tolist() == expected_sum(inputs, gone[:3], spec)


def test_a_sum_of_the_largest_values_does_not_wrap() -> None:
    here, spec = rehearsal(4, 0.1, 0.25), SumSpec(length=2, bits=10, bound=255)
    inputs = {n: np.array([255, 255], np.uint32) for n in range(4)}
    assert run_round(here, inputs, round=next(ROUNDS), spec=spec, model=MODEL).tolist() == [1020, 1020]


def hop(message: Message, clients: int, vector_bytes: int) -> Message:
    """Over the wire and back."""
    kind = type(message)
    limit = max_bytes(kind, clients=clients, neighbours=clients - 1, vector_bytes=vector_bytes)
    found = from_bytes(kind, to_bytes(message), max_bytes=limit)
    assert found == message
    return found


def test_three_waves_a_round_after_the_first_over_the_wire() -> None:
    pki, identities = make_pki(5)
    policy, run = Policy(dropout=0.2), b"wire"
    spec, waves = SumSpec(length=7, bits=20, bound=100), 0
    newcomers = {pki.number(one.public): Newcomer(identity=one, pki=pki, policy=policy, run=run) for one in identities}

    def go(message: Message) -> Message:
        return hop(message, 5, spec.length * spec.width)

    roster = Roster.of({n: go(one.commit()) for n, one in newcomers.items()})
    check_roster(roster, pki=pki, policy=policy, run=run)
    openings = Openings.of({n: go(one.open(go(roster))) for n, one in newcomers.items()})
    members = {n: one.enter(go(openings)) for n, one in newcomers.items()}
    coordinator = Coordinator(agree(roster, openings, pki=pki, policy=policy, run=run))
    for one in members.values():
        coordinator.add_offer(go(one.offer(1)))
    for round in (1, 2, 3):
        inputs, dropped = vectors(5, spec, round), round
        before = waves
        inboxes = coordinator.begin(round, spec=spec, model=MODEL)
        for n, one in members.items():
            if n != dropped:
                coordinator.add_masked(go(one.masked(go(inboxes[n]), inputs[n], spec=spec, model=MODEL)))
            # The next round's shares ride along; who drops out now sends them when it is back.
            coordinator.add_offer(go(one.offer(round + 1)))
        lists, waves = coordinator.survivors(), waves + 1
        for n in lists:
            coordinator.add_endorsement(go(members[n].endorse(go(lists[n]))))
        quorum, waves = coordinator.quorum(), waves + 1
        for n in lists:
            coordinator.add_reveal(go(members[n].reveal(go(quorum))))
        waves += 1
        assert coordinator.total().tolist() == expected_sum(inputs, {dropped}, spec)
        assert waves - before == 3


def test_masks_differ_from_round_to_round_and_say_nothing_of_the_input() -> None:
    here, spec = rehearsal(4, 0.1, 0.25), SumSpec(length=4096, bits=32, bound=1)
    coordinator, zeros, seen = here.coordinator, np.zeros(4096, np.uint32), []
    for _ in range(2):
        round = next(ROUNDS)
        for one in here.participants.values():
            coordinator.add_offer(one.offer(round))
        inbox = coordinator.begin(round, spec=spec, model=MODEL)[0]
        seen.append(spec.unpack(here.participants[0].masked(inbox, zeros, spec=spec, model=MODEL).vector))
    for words in (*seen, seen[0] - seen[1]):
        # The mean of 4096 uniform words, within 6.5 standard deviations.
        assert abs(words.astype(np.float64).mean() / 2**32 - 0.5) < 6.5 / np.sqrt(12 * 4096)
        assert len(np.unique(words)) > 4090


def test_a_bad_share_is_survived_if_there_are_more_and_told_if_not() -> None:
    here, spec = rehearsal(8, 0.1, 0.3), SumSpec(length=2, bits=32, bound=10)
    coordinator, members = here.coordinator, here.participants
    for missing in (0, 1, 2):
        round, inputs = next(ROUNDS), vectors(8, spec, missing)
        for one in members.values():
            coordinator.add_offer(one.offer(round))
        inboxes = coordinator.begin(round, spec=spec, model=MODEL)
        for n, one in members.items():
            coordinator.add_masked(one.masked(inboxes[n], inputs[n], spec=spec, model=MODEL))
        lists = coordinator.survivors()
        for n, one in members.items():
            coordinator.add_endorsement(one.endorse(lists[n]))
        quorum = coordinator.quorum()
        for n, one in members.items():
            reveal = one.reveal(quorum)
            if n == 3:
                # Member 3 lies about everybody's share, and signs it; of others than its neighbours it may not.
                lies = {other: bytes(33) for other in reveal.seeds}

                def lying(seeds: Boxes, keys: Boxes, reveal: Reveal = reveal) -> Reveal:
                    said = reveal_said(context=coordinator._round.context, member=3, seeds=seeds, keys=keys)
                    return replace(reveal, seeds=seeds, keys=keys, signature=members[3]._identity.sign(said))

                for seeds, keys in (({}, {}), (lies, {0: bytes(33)})):
                    with pytest.raises(ProtocolViolation, match="others"):
                        coordinator.add_reveal(lying(seeds, keys))
                reveal = lying(lies, {})
            if n < 8 - missing:
                coordinator.add_reveal(reveal)
        if missing < 2:
            assert coordinator.total().tolist() == expected_sum(inputs, (), spec)
        else:
            with pytest.raises(RoundFailed, match="do not give what it announced"):
                coordinator.total()


def test_inputs_that_do_not_fit_leave_the_round_open() -> None:
    here, spec = rehearsal(4, 0.1, 0.25), SumSpec(length=3, bits=16, bound=50)
    coordinator, round = here.coordinator, next(ROUNDS)
    for one in here.participants.values():
        coordinator.add_offer(one.offer(round))
    inbox, one = coordinator.begin(round, spec=spec, model=MODEL)[0], here.participants[0]
    good = np.full(3, 50, np.uint32)
    for vector, error in (
        (np.full(3, 51, np.uint32), BadUsage),
        (np.zeros(4, np.uint32), ShapeMismatch),
        (np.zeros(3, np.float64), BadUsage),
    ):
        with pytest.raises(error):
            one.masked(inbox, vector, spec=spec, model=MODEL)
    with pytest.raises(BadUsage, match="modulus"):
        one.masked(inbox, good, spec=SumSpec(length=3, bits=7, bound=50), model=MODEL)
    with pytest.raises(BadUsage, match="model digest"):
        one.masked(inbox, good, spec=spec, model=b"")
    before = good.copy()
    one.masked(inbox, good, spec=spec, model=MODEL)
    assert (good == before).all()


def test_of_many_threads_one_gets_the_masked_vector() -> None:
    here, spec = rehearsal(4, 0.1, 0.25), SumSpec(length=2_000_000, bits=32, bound=50)
    coordinator, round = here.coordinator, next(ROUNDS)
    for one in here.participants.values():
        coordinator.add_offer(one.offer(round))
    inbox, one = coordinator.begin(round, spec=spec, model=MODEL)[0], here.participants[0]
    together = threading.Barrier(8)

    def ask(value: int) -> bool:
        vector = np.full(spec.length, value, np.uint32)
        together.wait()
        return not refuses(lambda: one.masked(inbox, vector, spec=spec, model=MODEL))

    before = sys.getswitchinterval()
    try:
        # Threads take turns all the time.
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(ask, range(8))) == 1
    finally:
        sys.setswitchinterval(before)


def test_a_forked_copy_refuses_to_work() -> None:
    one = rehearsal(4, 0.1, 0.25).participants[0]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            one.offer(next(ROUNDS))
            os.write(writer, b"answered")
        except ProtocolViolation:
            os.write(writer, b"refused")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 20) == b"refused"
    os.close(reader)
    os.close(writer)


def test_participants_are_not_copied_and_show_no_secret() -> None:
    here = rehearsal(4, 0.1, 0.25)
    one = here.participants[1]
    one.offer(next(ROUNDS))
    assert repr(one) == "Participant(member=1)"
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not copied"):
            copier(one)
    secrets = [own.seed for own in one._own.values()] + list(one._to.keys.values())
    shown = repr(vars(one))
    assert not any(secret.hex() in shown or repr(secret) in shown for secret in secrets)


def test_secrets_of_a_round_are_gone_after_it() -> None:
    here, spec = rehearsal(4, 0.1, 0.25), SumSpec(length=1, bits=32, bound=50)
    run_round(here, vectors(4, spec, 0), round=next(ROUNDS), spec=spec, model=MODEL)
    for one in here.participants.values():
        assert one._own == {}
        assert one._round is None


def test_messages_of_another_session_or_round_are_refused() -> None:
    here, other = rehearsal(4, 0.1, 0.25), rehearsal(5, 0.0, 0.4).coordinator.session.id
    spec, coordinator, members = SumSpec(length=1, bits=32, bound=50), here.coordinator, here.participants
    inputs, round = vectors(4, spec, 0), next(ROUNDS)

    def refused(step: Callable[[Any], object], message: Message, **changes: object) -> None:
        for change in ({"session": other}, {"round": round + 1}, *([changes] if changes else [])):
            with pytest.raises(ProtocolViolation):
                step(replace(message, **change))

    for one in members.values():
        offer = one.offer(round)
        refused(coordinator.add_offer, offer, boxes=dict(list(offer.boxes.items())[:-1]))
        refused(coordinator.add_offer, offer, member=9)
        coordinator.add_offer(offer)
    inboxes = coordinator.begin(round, spec=spec, model=MODEL)
    for n, one in members.items():
        refused(
            lambda i, n=n: members[n].masked(i, inputs[n], spec=spec, model=MODEL), inboxes[n], active=(0, 1, 2, 3, 9)
        )
        masked = one.masked(inboxes[n], inputs[n], spec=spec, model=MODEL)
        refused(coordinator.add_masked, masked, vector=bytes(4))
        refused(coordinator.add_masked, masked, vector=b"")
        coordinator.add_masked(masked)
    lists = coordinator.survivors()
    assert lists == coordinator.survivors()
    for n, one in members.items():
        refused(one.endorse, lists[n], survivors=(0, 1, 2, 3, 9))
        endorsement = one.endorse(lists[n])
        refused(coordinator.add_endorsement, endorsement, member=(n + 1) % 4)
        coordinator.add_endorsement(endorsement)
    quorum = coordinator.quorum()
    for one in members.values():
        refused(one.reveal, quorum)
        reveal = one.reveal(quorum)
        refused(coordinator.add_reveal, reveal, seeds={})
        refused(coordinator.add_reveal, reveal, keys=reveal.seeds)
        coordinator.add_reveal(reveal)
    assert coordinator.total().tolist() == expected_sum(inputs, (), spec)


def test_what_comes_out_of_turn_at_the_server_is_refused() -> None:
    here, spec = rehearsal(5, 0.0, 0.4), SumSpec(length=2, bits=32, bound=50)
    coordinator, members, round = here.coordinator, here.participants, next(ROUNDS)
    offers = {n: one.offer(round) for n, one in members.items()}
    for offer in offers.values():
        coordinator.add_offer(offer)
    with pytest.raises(ProtocolViolation, match="twice"):
        coordinator.add_offer(offers[0])
    inboxes = coordinator.begin(round, spec=spec, model=MODEL)
    with pytest.raises(ProtocolViolation, match="round"):
        coordinator.begin(round, spec=spec, model=MODEL)
    inputs = vectors(5, spec, 1)
    masked = {n: one.masked(inboxes[n], inputs[n], spec=spec, model=MODEL) for n, one in members.items()}
    coordinator.add_masked(masked[0])
    with pytest.raises(ProtocolViolation, match="twice"):
        coordinator.add_masked(masked[0])
    with pytest.raises(RoundFailed):
        coordinator.survivors()
    for n in (1, 2, 3):
        coordinator.add_masked(masked[n])
    lists = coordinator.survivors()
    with pytest.raises(ProtocolViolation, match="too late"):
        coordinator.add_masked(masked[4])
    with pytest.raises(RoundFailed):
        coordinator.quorum()
    for n in lists:
        coordinator.add_endorsement(members[n].endorse(lists[n]))
    quorum = coordinator.quorum()
    for n in lists:
        coordinator.add_reveal(members[n].reveal(quorum))
    assert coordinator.total().tolist() == expected_sum(inputs, {4}, spec)
    with pytest.raises(ProtocolViolation, match="outside a round"):
        coordinator.total()


def test_who_did_not_offer_is_not_in_the_sum() -> None:
    pki, identities = make_pki(5)
    here = set_up(pki=pki, identities=identities, policy=Policy(corrupt=0.0, dropout=0.4), run=b"silent")
    coordinator, spec = here.coordinator, SumSpec(length=1, bits=32, bound=50)
    for n in range(4):
        coordinator.add_offer(here.participants[n].offer(1))
    coordinator.begin(1, spec=spec, model=MODEL)
    context, vector = coordinator._round.context, bytes(4)
    said = masked_said(context=context, member=4, vector=vector_digest(vector))
    masked = Masked(
        session=coordinator.session.id,
        round=1,
        member=4,
        context=context,
        vector=vector,
        signature=identities[4].sign(said),
    )
    with pytest.raises(ProtocolViolation, match="with it"):
        coordinator.add_masked(masked)


def test_a_corrupt_member_spoils_its_message_and_not_the_round() -> None:
    pki, identities = make_pki(5)
    here = set_up(pki=pki, identities=identities, policy=Policy(corrupt=0.0, dropout=0.4), run=b"corrupt")
    coordinator, members, session = here.coordinator, here.participants, here.coordinator.session
    spec, liar = SumSpec(length=2, bits=32, bound=50), identities[4]
    inputs = vectors(5, spec, 3)

    def refused(step: Callable[[Any], object], message: Message, match: str) -> None:
        with pytest.raises(ProtocolViolation, match=match):
            step(message)

    for n in (0, 1):
        coordinator.add_offer(members[n].offer(1))
    with pytest.raises(RoundFailed, match="offers: got 2"):
        coordinator.begin(1, spec=spec, model=MODEL)
    for n in (2, 3):
        coordinator.add_offer(members[n].offer(1))
    offer = members[4].offer(1)
    boxes = {n: box for n, box in offer.boxes.items() if n != 2}
    header = offer_header(session=session.id, round=1, sender=4, mask_key=offer.mask_key, seed_digest=offer.seed_digest)
    few = replace(offer, boxes=boxes, signature=liar.sign(offer_said(header=header, boxes=boxes)))
    refused(coordinator.add_offer, few, "3 boxes")
    coordinator.add_offer(offer)
    with pytest.raises(BadUsage, match="modulus"):
        coordinator.begin(1, spec=SumSpec(length=2, bits=7, bound=50), model=MODEL)
    inboxes = coordinator.begin(1, spec=spec, model=MODEL)
    refused(coordinator.add_offer, replace(offer, member=4), "too late")
    other = members[4].masked(inboxes[4], inputs[4], spec=spec, model=bytes(32))
    refused(coordinator.add_masked, other, "another model")
    for n in (0, 1, 2, 3):
        coordinator.add_masked(members[n].masked(inboxes[n], inputs[n], spec=spec, model=MODEL))
    lists = coordinator.survivors()
    assert list(lists) == [0, 1, 2, 3]
    context = coordinator._round.context
    signature = liar.sign(survivors_said(context=context, survivors=(0, 1, 2, 3)))
    mine = Endorsement(session=session.id, round=1, member=4, signature=signature)
    refused(coordinator.add_endorsement, mine, "no survivor")
    for n in lists:
        coordinator.add_endorsement(members[n].endorse(lists[n]))
    quorum = coordinator.quorum()
    shares = {n: bytes(33) for n in (0, 1, 2, 3)}
    said = reveal_said(context=context, member=4, seeds=shares, keys={})
    lie = Reveal(session=session.id, round=1, member=4, seeds=shares, keys={}, signature=liar.sign(said))
    refused(coordinator.add_reveal, lie, "others")
    for n in lists:
        coordinator.add_reveal(members[n].reveal(quorum))
    assert coordinator.total().tolist() == expected_sum(inputs, {4}, spec)


def test_a_sum_that_lacks_shares_may_be_asked_for_again() -> None:
    pki, identities = make_pki(6)
    here = set_up(pki=pki, identities=identities, policy=Policy(corrupt=0.1, dropout=0.2), run=b"again")
    coordinator, members = here.coordinator, here.participants
    spec, inputs = SumSpec(length=2, bits=32, bound=50), vectors(6, SumSpec(length=2, bits=32, bound=50), 3)
    for one in members.values():
        coordinator.add_offer(one.offer(1))
    inboxes = coordinator.begin(1, spec=spec, model=MODEL)
    for n in range(5):
        coordinator.add_masked(members[n].masked(inboxes[n], inputs[n], spec=spec, model=MODEL))
    with pytest.raises(ProtocolViolation, match="before the survivors"):
        coordinator.total()
    lists = coordinator.survivors()
    for n in lists:
        coordinator.add_endorsement(members[n].endorse(lists[n]))
    quorum = coordinator.quorum()
    for n in lists:
        # The last is the one that is missing: seeds of some are there before.
        with pytest.raises(RoundFailed):
            coordinator.total()
        coordinator.add_reveal(members[n].reveal(quorum))
    assert coordinator.total().tolist() == expected_sum(inputs, {5}, spec)


def test_the_server_keeps_one_offer_of_each_member() -> None:
    here = rehearsal(4, 0.1, 0.25)
    coordinator, one = here.coordinator, here.participants[0]
    first, second = one.offer(next(ROUNDS)), one.offer(next(ROUNDS))
    coordinator.add_offer(first)
    coordinator.add_offer(second)
    for old in (first, second):
        with pytest.raises(ProtocolViolation, match="twice"):
            coordinator.add_offer(old)
    assert list(coordinator._offers.values()) == [second]
