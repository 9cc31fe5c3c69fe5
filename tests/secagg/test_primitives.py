"""Shamir, masks, channels, identities: known answers with their provenance, and the guarantees as properties."""

import itertools
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer.errors import BadInput, BadUsage, ProtocolViolation, ShapeMismatch
from fedinfer.secagg import identities
from fedinfer.secagg.channels import MAX_SKIP, Chains, KeyPair, agree, derive, mask_seed, seal, unseal
from fedinfer.secagg.identities import Identity, PkiFile, check_signature
from fedinfer.secagg.masks import PIECE_BYTES, SumSpec, add_mask
from fedinfer.secagg.shamir import PRIME, SHARE_BYTES, at_zero, candidates, combine, split
from fedinfer.secagg.transcripts import transcript

# --- Known answers. ---


def test_x25519_of_rfc_7748_section_6_1() -> None:
    alice = KeyPair.of(bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = KeyPair.of(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert agree(alice, bob.public).hex() == agree(bob, alice.public).hex() == shared


def test_hkdf_of_rfc_5869_appendix_a_3() -> None:
    # Test case 3 has neither salt nor info; its first 32 of 42 bytes.
    assert derive(b"\x0b" * 22, b"").hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


def test_ed25519_of_rfc_8032_section_7_1_test_1() -> None:
    signer = Identity.of(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert signer.public.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert signer.sign(b"").hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe"
        "24655141438e7a100b"
    )
    check_signature(signer.public, b"", signer.sign(b""))


def test_aes_gcm_of_mcgrew_and_viega_cases_13_and_14() -> None:
    # The Galois/Counter Mode of Operation, appendix B (NIST's submission): 256-bit zero key, zero nonce.
    assert seal(bytes(32), round=0, header=b"", text=b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    sealed = "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    assert seal(bytes(32), round=0, header=b"", text=bytes(16)).hex() == sealed


def test_masks_are_the_stream_of_nist_sp_800_38a_f_5_1() -> None:
    key, counter = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c"), bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    text = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    sealed = bytes.fromhex("874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff")
    words = np.zeros(8, np.uint32)
    add_mask(words, key + counter, sign=1)
    assert words.astype("<u4").tobytes() == bytes(a ^ b for a, b in zip(text, sealed, strict=True))


def is_prime(n: int) -> bool:
    """Miller-Rabin with 40 bases: wrong for a composite with probability below 4^-40."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def test_the_field_is_the_smallest_prime_above_2_to_the_256() -> None:
    assert is_prime(PRIME)
    assert not any(is_prime(2**256 + step) for step in range(1, 297, 2))


def test_shares_of_a_line_worked_out_by_hand() -> None:
    # f(x) = 7 + 3x, with 3 drawn as 49 bytes.
    secret = (7).to_bytes(32, "big")
    shares = split(secret, threshold=2, count=3, entropy=lambda size: (3).to_bytes(size, "big"))
    assert [int.from_bytes(share, "big") for share in shares] == [10, 13, 16]
    # At 0 through x = 1, 3: 3/2 and -1/2.
    half = pow(2, -1, PRIME)
    assert at_zero((1, 3)) == (3 * half % PRIME, -half % PRIME)


# --- Shamir. ---


@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_threshold_of_shares_gives_the_secret_back(secret: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, count))
    shares = split(secret, threshold=threshold, count=count, entropy=os.urandom)
    points = data.draw(st.permutations(range(1, count + 1)))[: data.draw(st.integers(threshold, count))]
    assert combine({point: shares[point - 1] for point in points}) == secret


def test_fewer_shares_are_independent_of_the_secret() -> None:
    # For any secret there is just one polynomial through two shares of three: both secrets explain what is seen.
    shares = split(b"\x01" * 32, threshold=3, count=5, entropy=os.urandom)
    seen = {1: shares[0], 4: shares[3]}
    for secret in (b"\x01" * 32, b"\xfe" * 32):
        weights = at_zero((1, 4, 5))
        rest = int.from_bytes(secret, "big") - sum(
            w * int.from_bytes(s, "big") for w, s in zip(weights, seen.values(), strict=False)
        )
        completed = (rest * pow(weights[2], -1, PRIME) % PRIME).to_bytes(SHARE_BYTES, "big")
        assert combine({**seen, 5: completed}) == secret
    # And the shares themselves are uniform: their top bits differ from one splitting to the next.
    tops = Counter(split(bytes(32), threshold=2, count=2, entropy=os.urandom)[0][1] >> 7 for _ in range(2000))
    # Binomial(2000, 1/2) beyond 6.5 standard deviations: below 1e-10.
    assert abs(tops[0] - 1000) < 6.5 * np.sqrt(500)


def test_one_bad_share_among_more_than_the_threshold_is_survived() -> None:
    secret = os.urandom(32)
    shares = dict(enumerate(split(secret, threshold=4, count=7, entropy=os.urandom), start=1))
    assert next(candidates(shares, threshold=4)) == secret
    for bad in shares:
        tampered = {**shares, bad: bytes(SHARE_BYTES)}
        assert secret in list(candidates(tampered, threshold=4))
    assert list(candidates({1: shares[1]}, threshold=4)) == []
    exactly = {point: shares[point] for point in (1, 3, 5, 7)}
    assert list(candidates(exactly, threshold=4)) == [secret]
    assert secret not in list(candidates({**exactly, 1: bytes(SHARE_BYTES)}, threshold=4))


def test_what_is_no_share_or_threshold_is_refused() -> None:
    for secret, threshold, count in ((bytes(31), 2, 3), (bytes(32), 0, 3), (bytes(32), 4, 3)):
        with pytest.raises(BadUsage):
            split(secret, threshold=threshold, count=count, entropy=os.urandom)
    for share in (b"", bytes(32), PRIME.to_bytes(SHARE_BYTES, "big"), b"\xff" * SHARE_BYTES):
        with pytest.raises(ProtocolViolation):
            combine({1: share})
    for points in ((), (1, 1), (0, 1), (PRIME,)):
        with pytest.raises(BadUsage):
            at_zero(points)


# --- Masks and the modulus. ---


@given(st.integers(1, 3000), st.sampled_from(["<u4", "<u8"]), st.binary(min_size=32, max_size=32))
def test_a_mask_taken_away_leaves_what_was(length: int, word: str, seed: bytes) -> None:
    words = np.arange(length, dtype=word) * np.array(2**31 + 11, word)
    before = words.copy()
    add_mask(words, seed, sign=1)
    assert length < 2 or (words != before).any()
    add_mask(words, seed, sign=-1)
    assert (words == before).all()


def test_pieces_join_without_a_seam() -> None:
    length = 3 * PIECE_BYTES // 4 + 5
    whole, piece = np.zeros(length, np.uint32), np.zeros(PIECE_BYTES // 4, np.uint32)
    add_mask(whole, bytes(range(32)), sign=1)
    add_mask(piece, bytes(range(32)), sign=1)
    assert (whole[: len(piece)] == piece).all()
    assert len(np.unique(whole)) > 0.99 * length


@given(st.integers(1, 64), st.data())
def test_packed_words_come_back(bits: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 40))
    spec = SumSpec(length=length, bits=bits, bound=1)
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length))
    words = np.array(values, spec.word)
    packed = spec.pack(words)
    assert len(packed) == length * spec.width
    assert spec.unpack(packed).tolist() == values


def test_a_modulus_that_could_wrap_is_refused() -> None:
    spec = SumSpec(length=1, bits=10, bound=100)
    spec.check_clients(10)
    with pytest.raises(BadUsage, match="take 11 bits"):
        spec.check_clients(11)


def test_vectors_outside_their_range_are_refused() -> None:
    spec = SumSpec(length=3, bits=20, bound=9)
    spec.check_vector(np.array([0, 5, 9], np.uint32))
    with pytest.raises(BadUsage, match="above 9"):
        spec.check_vector(np.array([0, 5, 10], np.uint32))
    with pytest.raises(ShapeMismatch):
        spec.check_vector(np.zeros(4, np.uint32))
    for other in (np.zeros(3, np.int64), np.zeros(3, np.float32), np.zeros(3, np.uint64)):
        with pytest.raises(BadUsage, match="expected uint32"):
            spec.check_vector(other)
    for fields in ({"length": 0}, {"bits": 65}, {"bits": 0}, {"bound": 0}, {"bound": 2**20}, {"bound": 1.5}):
        with pytest.raises(BadUsage):
            SumSpec(**{"length": 3, "bits": 20, "bound": 9} | fields)


# --- Channels and transcripts. ---


def test_both_ends_have_the_same_mask_and_each_context_another() -> None:
    left, right = KeyPair.of(os.urandom(32)), KeyPair.of(os.urandom(32))
    seed = mask_seed(left, right.public, context=b"c", pair=(3, 7))
    assert seed == mask_seed(right, left.public, context=b"c", pair=(7, 3))
    assert seed != mask_seed(left, right.public, context=b"d", pair=(3, 7))
    assert seed != mask_seed(left, right.public, context=b"c", pair=(3, 8))


def test_a_box_opens_for_its_receiver_round_and_header_alone() -> None:
    ann, bob, eve = (KeyPair.of(os.urandom(32)) for _ in range(3))
    to_bob = Chains.agree(ann, {2: bob.public}, session=b"s", member=1)[0].at(5)
    to, back = (one.at(5) for one in Chains.agree(bob, {1: ann.public, 3: eve.public}, session=b"s", member=2))
    elsewhere = Chains.agree(bob, {1: ann.public}, session=b"t", member=2)[1].at(5)
    box = seal(to_bob.box_key(2), round=5, header=b"h", text=b"shares")
    assert unseal(back.box_key(1), round=5, header=b"h", box=box) == b"shares"
    changed = box[:-1] + bytes([box[-1] ^ 1])
    for key, round, header, found in (
        (back.box_key(3), 5, b"h", box),
        (to.box_key(1), 5, b"h", box),
        (back.at(6).box_key(1), 5, b"h", box),
        (back.box_key(1), 6, b"h", box),
        (back.box_key(1), 5, b"i", box),
        (back.box_key(1), 5, b"h", changed),
        (back.box_key(1), 5, b"h", b""),
        (elsewhere.box_key(1), 5, b"h", box),
    ):
        with pytest.raises(ProtocolViolation, match="does not open"):
            unseal(key, round=round, header=header, box=found)


def test_chains_move_on_and_not_back() -> None:
    ann, bob = KeyPair.of(os.urandom(32)), KeyPair.of(os.urandom(32))
    first = Chains.agree(ann, {2: bob.public}, session=b"s", member=1)[0]
    assert first.at(9).keys == first.at(4).at(9).keys != first.at(8).keys
    assert first.at(1).keys == first.keys
    for round in (2, 3 + MAX_SKIP + 1):
        with pytest.raises(ProtocolViolation, match="round"):
            first.at(3).at(round)


@pytest.mark.parametrize("public", [bytes(32), (1).to_bytes(32, "little"), b"short"])
def test_keys_of_small_order_are_refused(public: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        agree(KeyPair.of(os.urandom(32)), public)


def test_transcripts_tell_labels_numbers_and_lengths_apart() -> None:
    said = [("a", b"b"), ("ab",), ("a", b"", b"b"), ("a", b"b", b""), ("a", 98), ("a", (98).to_bytes(8, "big")), ("a",)]
    assert len({transcript(*parts) for parts in said}) == len(said)
    for left, right in itertools.combinations(said, 2):
        assert transcript(*left) != transcript(*right)


# --- Identities and the PKI file. ---


def test_a_pki_file_is_made_pinned_and_read(tmp_path: Path) -> None:
    path, device = tmp_path / "federation.pki", Identity.generate(os.urandom)
    identities.init(path)
    old, _ = identities.show(path)
    added = identities.add(path, "clinic-1", device.public)
    digest, members = identities.show(path)
    assert (digest != old, members) == (True, [("clinic-1", device.public.hex())])
    assert PkiFile.read(path, pinned=digest) == added
    assert added.number(device.public) == 0
    assert added.key(0) == device.public
    with pytest.raises(BadInput, match="ask who runs the federation"):
        PkiFile.read(path, pinned=old)
    with pytest.raises(BadInput, match="a file already"):
        identities.init(path)
    with pytest.raises(BadInput, match="twice"):
        identities.add(path, "clinic-1", Identity.generate(os.urandom).public)
    with pytest.raises(BadInput, match="twice"):
        identities.add(path, "clinic-2", device.public)
    with pytest.raises(BadInput, match="letters"):
        identities.add(path, "../clinic", Identity.generate(os.urandom).public)
    assert identities.show(path)[0] == digest


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "fedinfer PKI 1"}', '{"format": "fedinfer PKI 1", "members": [{"name": 1}]}']
)
def test_a_file_that_is_no_pki_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "no.pki"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="another kind"):
        identities.show(path)


def test_strangers_are_nobody() -> None:
    pki = PkiFile(names=("a",), keys=(bytes(32),))
    with pytest.raises(BadUsage, match="does not name"):
        pki.number(b"\x01" * 32)
    for member in (-1, 1):
        with pytest.raises(ProtocolViolation):
            pki.key(member)


def test_an_identity_is_kept_by_its_owner_alone(tmp_path: Path) -> None:
    path, device = tmp_path / "device.key", Identity.generate(os.urandom)
    device.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load(path).public == device.public
    with pytest.raises(BadInput, match="already"):
        device.save(path)
    path.chmod(0o640)
    with pytest.raises(BadInput, match="others may read"):
        Identity.load(path)
    path.chmod(0o600)
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(BadInput, match="no identity"):
        Identity.load(path)
    with pytest.raises(BadInput, match="no such file"):
        Identity.load(tmp_path / "none")


def test_signatures_of_others_or_of_something_else_are_refused() -> None:
    ann, bob = Identity.generate(os.urandom), Identity.generate(os.urandom)
    good = ann.sign(b"statement")
    for key, statement, signature in (
        (bob.public, b"statement", good),
        (ann.public, b"another", good),
        (ann.public, b"statement", bytes(64)),
        (ann.public, b"statement", b""),
        (b"no key", b"statement", good),
    ):
        for _ in range(2):
            with pytest.raises(ProtocolViolation, match="signature"):
                check_signature(key, statement, signature)


def test_secrets_are_not_shown_or_copied() -> None:
    secret = bytes(range(7, 39))
    chains = Chains(round=1, keys={1: secret})
    for holder in (KeyPair.of(secret), Identity.of(secret), chains):
        assert secret.hex() not in repr(holder)
        assert repr(secret) not in repr(holder)
        with pytest.raises(TypeError, match="not copied"):
            pickle.dumps(holder)
