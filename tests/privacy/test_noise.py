"""The stream is AES-256-CTR, hands out no byte twice, and is not copied; float noise has the shape it claims."""

import copy
import os
import pickle
import threading

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from fedinfer.errors import PrivacyError
from fedinfer.privacy import noise
from fedinfer.privacy.discrete import discrete_gaussian
from fedinfer.privacy.noise import NoiseStream, insecure_seeded_noise, os_noise

FALSE_ALARM = 1e-9


def test_the_stream_is_aes_256_ctr_by_nist() -> None:
    # NIST SP 800-38A, F.5.5 CTR-AES256.Encrypt, key and first block; the standard's counter is not zero, so the
    # cipher is checked with it and the stream against the cipher at zero.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain, expected = "6bc1bee22e409f96e93d7e117393172a", "601ec313775789a5b7a7f504bbf3d228"
    standard = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()
    assert standard.update(bytes.fromhex(plain)).hex() == expected
    at_zero = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(2**20))
    stream = NoiseStream(key, void=False)
    # Small, empty and larger than any buffer.
    sizes = (5, 0, 2**19, 64)
    taken = b"".join(stream.take(size) for size in sizes)
    assert taken == at_zero[: sum(sizes)]
    assert stream.position == sum(sizes)


def test_bytes_put_back_come_next() -> None:
    stream, same = insecure_seeded_noise("back"), insecure_seeded_noise("back")
    expected = same.take(100)
    first = stream.take(60)
    stream.put_back(first[50:])
    stream.put_back(first[40:50])
    assert stream.position == 40
    assert first[:40] + stream.take(10) + stream.take(50) == expected
    assert stream.position == 100


def test_extra_bytes_belong_to_a_place_and_are_no_part_of_the_stream() -> None:
    stream = insecure_seeded_noise("extra")
    ahead = insecure_seeded_noise("extra").take(2**16)
    extra = stream.extra(16, 64)
    assert stream.extra(16, 160)[:64] == extra
    assert stream.position == 0
    others = [stream.extra(place, 64) for place in (0, 15, 17, 32, 2**40)]
    assert len({extra, *others}) == 6
    assert all(part not in ahead for part in (extra, *others))
    key = bytes(range(32))
    counter = (2**127 + 16 * 2**32).to_bytes(16, "big")
    block = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(bytes(64))
    assert NoiseStream(key, void=True).extra(16, 64) == block


def in_a_child(action: object) -> int:
    """Exit code of a forked process that does it: 0 if it was refused, 1 if it was not."""
    child = os.fork()
    if child == 0:
        try:
            action()  # type: ignore[operator]
        except PrivacyError:
            os._exit(0)
        except BaseException:
            os._exit(2)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Later versions of Python warn of threads at a fork; the child here touches none.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_does_not_repeat_the_noise() -> None:
    stream = os_noise()
    stream.put_back(stream.take(16))
    for draw in (
        lambda: stream.take(16),
        lambda: stream.extra(0, 16),
        lambda: stream.uniform(1),
        lambda: stream.gaussian_float(1.0, 1),
        lambda: discrete_gaussian(stream, variance=1, count=1),
    ):
        assert in_a_child(draw) == 0
    # The parent goes on, and the child may make a stream of its own.
    assert len(stream.take(16)) == 16
    assert in_a_child(lambda: os_noise().take(16)) == 1


def test_a_fork_is_seen_by_either_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process id may be used again by a grandchild, and a fork by C code calls no hook of Python's."""
    stream = os_noise()
    with monkeypatch.context() as patch:
        patch.setattr(noise, "_forks", noise._forks + 1)
        with pytest.raises(PrivacyError, match="forked process"):
            stream.take(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(PrivacyError, match="forked process"):
            stream.take(1)
    assert len(stream.take(1)) == 1


def test_threads_share_no_bytes() -> None:
    stream = os_noise()
    taken: list[list[bytes]] = [[], [], [], []]

    def draw(out: list[bytes]) -> None:
        for _ in range(500):
            words = stream.take(48)
            out.extend((words[:16], words[16:32]))
            stream.put_back(b"")
            out.append(words[32:])

    def draw_numbers() -> None:
        for _ in range(100):
            discrete_gaussian(stream, variance=2**40, count=20)

    threads = [threading.Thread(target=draw, args=(out,)) for out in taken]
    threads += [threading.Thread(target=draw_numbers) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocks = [block for out in taken for block in out]
    assert len(set(blocks)) == len(blocks) == 6000


def test_who_is_alone_is_not_disturbed() -> None:
    stream, taken = os_noise(), []
    other = threading.Thread(target=lambda: taken.append(stream.take(16)))
    with stream.alone():
        other.start()
        other.join(0.1)
        assert not taken
        stream.take(16)
    other.join()
    assert stream.position == 32
    assert len(taken) == 1


def test_a_stream_is_not_copied_and_its_key_is_not_shown() -> None:
    stream = os_noise()
    for make_copy in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="is not copied"):
            make_copy(stream)
    assert repr(stream) == "NoiseStream(void=False)"


def test_seeded_noise_repeats_and_says_that_it_is_void() -> None:
    one, two = insecure_seeded_noise("a"), insecure_seeded_noise("a")
    assert np.array_equal(one.gaussian_float(1.0, 10), two.gaussian_float(1.0, 10))
    assert not np.array_equal(one.gaussian_float(1.0, 10), insecure_seeded_noise("b").gaussian_float(1.0, 10))
    assert one.void
    assert not os_noise().void


def looks_gaussian(values: np.ndarray, sigma: float) -> bool:
    """A chi-square test of the variance and Kolmogorov's test of the shape."""
    square = float((values**2).sum() / sigma**2)
    tail = 2 * min(stats.chi2.cdf(square, len(values)), stats.chi2.sf(square, len(values)))
    return bool(tail > FALSE_ALARM and stats.kstest(values / sigma, "norm").pvalue > FALSE_ALARM)


def test_float_noise_is_gaussian_and_the_test_sees_two_per_cent() -> None:
    values = insecure_seeded_noise("float").gaussian_float(3.0, 500_000)
    assert looks_gaussian(values, 3.0)
    assert not looks_gaussian(values * 1.02, 3.0)
    assert not looks_gaussian(values * 0.98, 3.0)
    assert not looks_gaussian(np.random.default_rng(0).laplace(scale=3.0 / np.sqrt(2), size=500_000), 3.0)


def test_noise_is_independent_across_draws_steps_clients_and_restarts() -> None:
    count = 200_000
    clients = [insecure_seeded_noise(f"client {index}") for index in range(3)]
    # Two steps of each of three clients, and one of them after a restart with a new key.
    rows = [discrete_gaussian(stream, variance=2**40, count=count) for stream in clients for _ in range(2)]
    rows.append(discrete_gaussian(insecure_seeded_noise("client 0, restarted"), variance=2**40, count=count))
    values = np.stack(rows) / 2.0**20
    # Under independence a correlation is normal with variance 1 / count: 7 of them is 1e-11.
    bound = 7.0 / np.sqrt(count)
    signed = np.corrcoef(values) - np.eye(len(values))
    squared = np.corrcoef(values**2) - np.eye(len(values))
    assert np.abs(signed).max() < bound
    assert np.abs(squared).max() < bound
    for lag in (1, 2, 3, 16, 1000):
        for row in (values[0], np.abs(values[0]), np.sign(values[0])):
            assert abs(np.corrcoef(row[:-lag], row[lag:])[0, 1]) < bound
    # And the test sees it if it is not so.
    again = np.corrcoef(values[0][:-1] + 0.05 * values[0][1:], values[0][1:])[0, 1]
    assert again > bound


def test_real_streams_differ() -> None:
    draws = [discrete_gaussian(os_noise(), variance=2**60, count=4).tolist() for _ in range(50)]
    assert len({number for draw in draws for number in draw}) == 200


def test_uniform_numbers_are_uniform() -> None:
    assert stats.kstest(insecure_seeded_noise("uniform").uniform(200_000), "uniform").pvalue > FALSE_ALARM


class OneWord(NoiseStream):
    """A stream of one word, again and again."""

    def __init__(self, word: int) -> None:
        super().__init__(bytes(32), void=True)
        self._word = word

    def take(self, size_bytes: int) -> bytes:
        return self._word.to_bytes(8, "little") * (size_bytes // 8)


@pytest.mark.parametrize("word", [0, 1, 2**11, 2**12, 2**63, 2**64 - 2**12, 2**64 - 2**11, 2**64 - 1])
def test_uniform_numbers_are_never_zero_or_one(word: int) -> None:
    (value,) = OneWord(word).uniform(1)
    assert 0.0 < value < 1.0
    # No rounding: the number is the middle of its cell, so that a rate of k / 2**52 is met exactly.
    assert value == (word >> 12) * 2.0**-52 + 2.0**-53
