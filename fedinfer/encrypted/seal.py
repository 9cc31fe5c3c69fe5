"""The client's secret half, by SEAL through TenSEAL's bindings: keys, encryption and decryption.

What leaves it are residues in the format of `frames`, not SEAL's files: the server never parses those. SEAL reads and
writes files only, so its objects pass through memory that has a path but no name on any disk.
Reference: SEAL 4 serialisation: a header of 16 bytes, then the members in order.
"""

import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import tenseal.sealapi as seal
import zstandard
from numpy.typing import NDArray

from fedinfer.encrypted.frames import pack, packed_bytes, unpack
from fedinfer.encrypted.keys import KeyPlan
from fedinfer.encrypted.params import Parameters
from fedinfer.encrypted.ring import held_by, joined, outputs_of, ring_of
from fedinfer.encrypted.xof import SEED_BYTES
from fedinfer.errors import EncryptedError

Floats = NDArray[np.float64]
HEADER = struct.Struct("<HBBBBHQ")
CIPHERTEXT = struct.Struct("<32sBQQQdQ")
PLAINTEXT = struct.Struct("<32sQd")
BLAKE2XB = 1
MAGIC = 0xA15E


@contextmanager
def _memory_file() -> Iterator[str]:
    """A path to anonymous memory; where the system has none, a file in a private folder that is gone afterwards."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("fedinfer")
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield os.path.join(folder, "object")


def _file_of(savable: Any) -> bytes:
    with _memory_file() as path:
        savable.save(path)
        with open(path, "rb") as file:
            return file.read()


def _version(savable: Any) -> tuple[int, int]:
    _, _, major, minor, _, _, _ = HEADER.unpack_from(_file_of(savable))
    return major, minor


def _saved(savable: Any) -> bytes:
    """The members of a SEAL object, decompressed."""
    data = _file_of(savable)
    _, header_bytes, _, _, compression, _, size = HEADER.unpack_from(data)
    body = data[header_bytes:size]
    if compression == 0:
        return body
    if compression == 1:
        return zlib.decompress(body)
    return zstandard.ZstdDecompressor().decompressobj().decompress(body)


class _Reader:
    """Takes a SEAL object apart, member by member."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def integer(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def skip_header(self) -> None:
        self.take(HEADER.size)

    def seeded(self) -> tuple[NDArray[np.uint64], bytes]:
        """The first polynomial (primes, N) of a ciphertext and the seed of the second."""
        _, _, _, degree, levels, _, _ = CIPHERTEXT.unpack(self.take(CIPHERTEXT.size))
        self.skip_header()
        words = self.integer()
        if words != degree * levels:
            raise EncryptedError("SEAL: got a ciphertext without a seed, expected one with")
        first = np.frombuffer(self.take(8 * words), "<u8").reshape(levels, degree)
        self.skip_header()
        if self.take(1)[0] != BLAKE2XB:
            raise EncryptedError("SEAL: got seeds of another generator, expected Blake2Xb")
        return first, self.take(SEED_BYTES)

    def end(self) -> None:
        if self._at != len(self._data):
            raise EncryptedError("SEAL: got an object of another format than that of version 4")


class SealSecretSide:
    """A secret key and what can be done with it. It is not printed or copied, and written by `key_store` alone."""

    def __init__(self, parameters: Parameters, plan: KeyPlan, stored: bytes | None = None) -> None:
        literal = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        literal.set_poly_modulus_degree(parameters.degree)
        literal.set_coeff_modulus([seal.Modulus(prime) for prime in parameters.primes])
        # SEAL refuses parameters below 128 bits too; our own table is checked in `Parameters`.
        self._context = seal.SEALContext(literal, True, seal.SEC_LEVEL_TYPE.TC128)
        if not self._context.parameters_set():
            raise EncryptedError(f"parameters: SEAL refuses them ({self._context.parameters_error_name()})")
        self._parameters, self._plan = parameters, plan
        secret = seal.SecretKey()
        if stored is None:
            secret = seal.KeyGenerator(self._context).secret_key()
        else:
            self._read_into(secret, stored)
        self._generator = seal.KeyGenerator(self._context, secret)
        self._encoder = seal.CKKSEncoder(self._context)
        self._encryptor = seal.Encryptor(self._context, secret)
        self._decryptor = seal.Decryptor(self._context, secret)
        data = self._context.last_context_data()
        for _ in range(plan.answer - 1):
            data = data.prev_context_data()
        self._answer_id = data.parms_id()
        self._version = _version(literal)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is not copied or written")

    def public_keys(self) -> list[bytes]:
        """Public key, relinearisation key and just the rotation keys that are needed, each for just its levels."""
        degree = self._parameters.degree
        parts = [self._public_key()]
        if self._plan.relinearisation:
            (digits,) = self._switching_keys(self._generator.create_relin_keys())
            parts.append(self._trimmed(digits, self._plan.relinearisation))
        if self._plan.rotations:
            # SEAL's overload for steps is shadowed by the one for Galois elements: 3^step mod 2N.
            elements = {pow(3, step, 2 * degree): level for step, level in self._plan.rotations}
            keys = self._switching_keys(self._generator.create_galois_keys(list(elements)))
            # SEAL keeps them in the order of their elements.
            found = dict(zip(sorted(elements), keys, strict=True))
            parts += [self._trimmed(found[pow(3, step, 2 * degree)], level) for step, level in self._plan.rotations]
        return parts

    def _public_key(self) -> bytes:
        """An encryption of zero at the level of answers. The server draws its second polynomial from the seed.

        So no client can choose it, and a product with a ternary polynomial hides what it is added to, whatever the
        first polynomial is.
        """
        plain = seal.Plaintext()
        self._encoder.encode(0.0, self._answer_id, 1.0, plain)
        reader = _Reader(_saved(self._encryptor.encrypt_symmetric(plain)))
        first, seed = reader.seeded()
        reader.end()
        return seed + pack(first, self._parameters.primes[: self._plan.answer])

    def _switching_keys(self, keys: Any) -> list[list[tuple[NDArray[np.uint64], bytes]]]:
        reader, found = _Reader(_saved(keys)), []
        reader.take(32)
        for _ in range(reader.integer()):
            digits = []
            for _ in range(reader.integer()):
                reader.skip_header()
                digits.append(reader.seeded())
            if digits:
                found.append(digits)
        reader.end()
        return found

    def _trimmed(self, digits: list[tuple[NDArray[np.uint64], bytes]], level: int) -> bytes:
        primes = self._parameters.primes
        kept = [*range(level), len(primes) - 1]
        return b"".join(seed + pack(first[kept], [primes[k] for k in kept]) for first, seed in digits[:level])

    def encrypt(self, slots: Floats) -> bytes:
        """Encrypt `slots` (N / 2,) under the secret key; half of the ciphertext is a seed."""
        plain = seal.Plaintext()
        self._encoder.encode(slots.tolist(), self._context.first_parms_id(), self._parameters.scale, plain)
        reader = _Reader(_saved(self._encryptor.encrypt_symmetric(plain)))
        first, seed = reader.seeded()
        reader.end()
        return seed + pack(first, self._parameters.primes[: self._parameters.levels])

    def decrypt(self, answer: bytes, *, outputs: int, scale: float) -> Floats:
        """The `outputs` numbers of an answer, a power of two of them.

        An answer is the second polynomial in NTT form and only those coefficients of the first that hold an output.
        Raises: WireError if it has another size or a residue that is none.
        """
        level, degree = self._plan.answer, self._parameters.degree
        primes, ring = self._parameters.primes[:level], ring_of(self._parameters, self._parameters.primes)
        tail, chosen, step = packed_bytes(primes, degree), ring.chosen(level), degree // (2 * outputs)
        second = unpack(answer[:tail], primes, degree, polynomials=1, what="answer")[0]
        held = unpack(answer[tail:], primes, outputs, polynomials=1, what="answer")[0]
        coefficients = np.zeros((level, degree))
        coefficients[:, ::step][:, :outputs] = held
        words = np.stack([ring.to_seal(ring.transformed(coefficients, chosen), chosen), second]).reshape(-1)
        members = CIPHERTEXT.pack(struct.pack("<4Q", *self._answer_id), 1, 2, degree, level, scale, 1)
        array = struct.pack("<Q", len(words)) + words.astype("<u8").tobytes()
        plain = seal.Plaintext()
        self._decryptor.decrypt(self._load(self._wrapped(members + self._wrapped(array))), plain)
        reader = _Reader(_saved(plain))
        reader.take(PLAINTEXT.size)
        reader.skip_header()
        residues = np.frombuffer(reader.take(8 * reader.integer()), "<u8").reshape(level, degree)
        message = ring.inverse(ring.from_seal(residues, chosen), chosen)[:, ::step]
        # The pair of coefficients i and -i has a meaning only together, and modulo the primes.
        return outputs_of(joined([held_by(row) for row in message], primes)) / scale

    def _wrapped(self, members: bytes) -> bytes:
        return HEADER.pack(MAGIC, HEADER.size, *self._version, 0, 0, HEADER.size + len(members)) + members

    def stored_for_key_store(self) -> bytes:
        """The secret key itself, for `key_store` to encrypt and for nobody else."""
        return _file_of(self._generator.secret_key())

    def _load(self, data: bytes) -> Any:
        loaded = seal.Ciphertext()
        self._read_into(loaded, data)
        return loaded

    def _read_into(self, target: Any, data: bytes) -> None:
        with _memory_file() as path:
            with open(path, "wb") as file:
                file.write(data)
            target.load(self._context, path)
