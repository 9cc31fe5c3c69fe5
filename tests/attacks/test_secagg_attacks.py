"""Attacks on the secure sum: each succeeds against Flower's SecAgg+ or a naive version, and fails on ours.

python -m tests.attacks.test_secagg_attacks [FILE]      prints the table, or writes it as JSON
"""

import json
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from fedinfer.errors import ProtocolViolation
from fedinfer.secagg.channels import KeyPair, mask_seed, own_seed
from fedinfer.secagg.graph import sparsest
from fedinfer.secagg.masks import Words, add_mask
from fedinfer.secagg.setup_messages import Roster
from fedinfer.secagg.shamir import combine
from tests.attacks import secagg_graphs as graphs
from tests.attacks import secagg_peers as peers
from tests.attacks import secagg_rounds as rounds
from tests.attacks import secagg_sessions as sessions
from tests.attacks.secagg_cheat import MODEL, SPEC, VICTIM, Cheat, newcomers


def test_the_bound_holds_for_the_best_choice_of_dropouts() -> None:
    small = sparsest(clients=16, corrupt=1, dropouts=1, bits=2)
    assert small is not None
    # At most a quarter of 400, and 6 standard deviations.
    assert graphs.unsafe_graphs(small.cycles, small.threshold, small.cut_off, 400) <= 100 + 6 * 8.7
    # A single cycle falls apart nearly always.
    assert graphs.unsafe_graphs(1, 1, 1, 100) > 50


@dataclass
class Game:
    """A round in one of two worlds with the same honest sum: who has the large input, member 0 or member 1?"""

    cheat: Cheat

    def play(self, world: int, held: Collection[int]) -> tuple[int, Words, Words]:
        """The coalition's guess; and what it takes the honest sum for, and what that was.

        `held`: the members whose shares it sees, beside what is revealed. It takes off each mask that it can.
        """
        cheat, round = self.cheat, next(self.cheat.rounds)
        vectors = {n: np.full(4, 2**19 if n == world else 7 * n, np.uint32) for n in cheat.honest}
        vectors[1 - world] = np.zeros(4, np.uint32)
        vectors |= {n: np.zeros(4, np.uint32) for n in cheat.corrupt}
        offers = cheat.offers(round)
        boxes = {n: cheat.inbox(n, offers, cheat.members, round) for n in cheat.members}
        corrupt_keys = {n: cheat.members[n]._own[round].key for n in cheat.corrupt}
        dropped = cheat.honest[-1]
        survivors = [n for n in cheat.members if n != dropped]
        masked = {n: cheat.members[n].masked(boxes[n], vectors[n], spec=SPEC, model=MODEL) for n in cheat.members}
        seen = {n: cheat.members[n]._round for n in held}
        signatures = cheat.endorsed(round, masked, survivors)
        reveals = {n: cheat.members[n].reveal(cheat.quorum(round, signatures)) for n in survivors}

        def secret(member: int, kind: str) -> KeyPair | bytes | None:
            shares = {}
            for place, n in enumerate(cheat.session.neighbours[member], start=1):
                known = [getattr(source[n], kind) for source in (reveals, seen) if n in source]
                for given in known:
                    if member in given:
                        shares[place] = given[member]
            if len(shares) < cheat.parameters.threshold:
                return None
            found = combine(dict(list(shares.items())[: cheat.parameters.threshold]))
            return KeyPair.of(found) if kind == "keys" else found

        keys = {n: found for n in cheat.members if (found := secret(n, "keys")) is not None} | corrupt_keys
        residues = {}
        for n in survivors:
            if n in cheat.corrupt:
                continue
            context, words = masked[n].context, SPEC.unpack(masked[n].vector).copy()
            add_mask(words, own_seed(secret(n, "seeds"), context=context, member=n), sign=-1)
            for other in cheat.session.neighbours[n]:
                pair = (n, other)
                if other in keys:
                    seed = mask_seed(keys[other], offers[n].mask_key, context=context, pair=pair)
                elif n in keys:
                    seed = mask_seed(keys[n], offers[other].mask_key, context=context, pair=pair)
                else:
                    continue
                add_mask(words, seed, sign=-1 if n < other else 1)
            residues[n] = words
        # The larger of two inputs, if there is nothing left on them; else any order.
        guess = int(int(residues[1][0]) > int(residues[0][0]))
        known = np.sum(list(residues.values()), axis=0, dtype=np.uint32)
        truth = np.sum([vectors[n] for n in residues], axis=0, dtype=np.uint32)
        return guess, known, truth


def test_a_coalition_below_the_threshold_learns_only_the_honest_survivors_sum() -> None:
    game, random = Game(Cheat(clients=5, corrupt=0.2, dropout=0.2)), np.random.default_rng(11)
    right = 0
    for _ in range(1000):
        world = int(random.integers(2))
        guess, known, truth = game.play(world, held=game.cheat.corrupt)
        right += guess == world
        assert (known == truth).all()
    p_value = binomtest(right, 1000).pvalue
    print(f"coalition below the threshold: {right} of 1000 guesses right, p = {p_value:.3f}")
    assert p_value > 1e-9


def test_a_coalition_at_the_threshold_wins_the_same_game() -> None:
    # The naive threshold: as many shares as the coalition has.
    game, random = Game(Cheat(clients=5, corrupt=0.2, dropout=0.2)), np.random.default_rng(12)
    for _ in range(20):
        world = int(random.integers(2))
        assert game.play(world, held=game.cheat.members)[0] == world


@dataclass(frozen=True)
class Row:
    attack: str
    ours: Callable[[], bool]
    flower: Callable[[], bool] | None
    naive: Callable[[], bool] | None = None


ATTACKS = (
    Row("member named alive and dead", rounds.alive_and_dead, peers.alive_and_dead),
    Row("replayed round", rounds.replayed_round, peers.replayed_round, peers.naive_replayed_round),
    Row("forged and swapped keys", sessions.forged_keys, peers.forged_keys),
    Row("tampered share gives a wrong sum", rounds.tampered_share, peers.tampered_share),
    Row("lowered threshold", rounds.lowered_threshold, peers.lowered_threshold),
    Row("another model for the victim", rounds.two_models, peers.two_models),
    Row("oversized roster wraps", sessions.oversized_roster, peers.oversized_roster),
    Row("input out of range", rounds.out_of_range, peers.out_of_range),
    Row("second reveal", rounds.duplicate_reveal, peers.duplicate_reveal, peers.naive_duplicate_reveal),
    Row("second masked vector", rounds.two_masked_vectors, peers.two_masked_vectors, peers.naive_two_masked_vectors),
    Row("offers withheld from the victim", rounds.withheld_offers, peers.withheld_offers),
    Row("neighbours chosen by the server", rounds.surrounded_victim, peers.surrounded_victim),
    Row("dropouts chosen around a group", graphs.chosen_dropouts_ours, None, graphs.chosen_dropouts_ring),
    Row("dropout before the shares stops the round", rounds.early_dropout, peers.early_dropout),
    Row("device seized after the round", rounds.seized_device, peers.seized_device, rounds.naive_seized_device),
    Row("mask seeds of 32 bits", rounds.seed_of_32_bits, peers.seed_of_32_bits),
)


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row.attack)
def test_an_attack_succeeds_elsewhere_and_fails_here(row: Row) -> None:
    assert any(attack() for attack in (row.flower, row.naive) if attack is not None)
    assert not row.ours()


@pytest.mark.parametrize("name", [name for name, _ in sessions.forged_commits()])
def test_a_roster_with_a_forged_commit_is_refused(name: str) -> None:
    here = newcomers()
    commits = {n: one.commit() for n, one in here.items()}
    with pytest.raises(ProtocolViolation):
        here[VICTIM].open(Roster.of(dict(sessions.forged_commits())[name](commits)))
    here[VICTIM].open(Roster.of(commits))
    with pytest.raises(ProtocolViolation, match="second"):
        here[VICTIM].open(Roster.of(commits))


def table() -> dict[str, dict[str, str]]:
    """Each attack with who survives it."""

    def fate(attack: Callable[[], bool] | None) -> str:
        return "not tried" if attack is None else "broken" if attack() else "survives"

    return {
        row.attack: {"fedinfer": fate(row.ours), "Flower SecAgg+": fate(row.flower), "naive": fate(row.naive)}
        for row in ATTACKS
    }


def main() -> None:
    """Print the table, or write it as JSON."""
    found = table()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{'attack':44}{'fedinfer':>12}{'Flower SecAgg+':>18}{'naive':>12}")
    for attack, fates in found.items():
        print(f"{attack:44}{fates['fedinfer']:>12}{fates['Flower SecAgg+']:>18}{fates['naive']:>12}")


if __name__ == "__main__":
    main()
