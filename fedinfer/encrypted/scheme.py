"""The seam between circuits and cryptography: one circuit runs on TenSEAL for real and in the clear for tests.

A `SecretSide` belongs to the client and holds the secret key; it has no serialiser. A `ServerSide` holds the client's
public keys only. Ciphertexts cross as bytes. SEAL writes and reads files only, so bytes go through a folder in memory.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from fedinfer.encrypted.params import Parameters
from fedinfer.errors import EncryptedError

Floats = NDArray[np.float64]
Ciphertext = Any
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


class SecretSide(Protocol):
    """The client's half: keys, encryption and decryption."""

    def public_keys(self) -> tuple[bytes, ...]: ...
    def encrypt(self, values: Floats) -> bytes: ...
    def decrypt(self, answer: bytes) -> Floats: ...


class ServerSide(Protocol):
    """The server's half: arithmetic on vectors of `Parameters.slots` numbers that it cannot see."""

    def read(self, query: bytes) -> Ciphertext: ...
    def write(self, answer: Ciphertext) -> bytes: ...
    def times(self, x: Ciphertext, values: Floats) -> Ciphertext: ...
    def plus(self, x: Ciphertext, values: Floats) -> Ciphertext: ...
    def square(self, x: Ciphertext) -> Ciphertext: ...
    def rotate_and_sum(self, x: Ciphertext, steps: Sequence[int]) -> Ciphertext: ...
    def rerandomise(self, x: Ciphertext) -> Ciphertext: ...


class Scheme(Protocol):
    """How to make the two halves for given parameters and rotation steps."""

    def secret_side(self, parameters: Parameters, steps: Sequence[int]) -> SecretSide: ...
    def server_side(self, parameters: Parameters, steps: Sequence[int], keys: Sequence[bytes]) -> ServerSide: ...


class _Seal:
    """What both halves know: the context, the levels and the primes."""

    def __init__(self, parameters: Parameters) -> None:
        literal = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        literal.set_poly_modulus_degree(parameters.degree)
        literal.set_coeff_modulus(seal.CoeffModulus.Create(parameters.degree, list(parameters.prime_bits)))
        # SEAL refuses parameters below 128 bits too; our own table is checked in `Parameters`.
        self.context = seal.SEALContext(literal, True, seal.SEC_LEVEL_TYPE.TC128)
        if not self.context.parameters_set():
            raise EncryptedError(f"parameters: SEAL refuses them ({self.context.parameters_error_name()})")
        self.primes = [prime.value() for prime in literal.coeff_modulus()]
        self.encoder = seal.CKKSEncoder(self.context)
        self.scale = 2.0**parameters.scale_bits
        self.top = parameters.top
        self.ids = {}
        data = self.context.first_context_data()
        while data is not None:
            self.ids[data.chain_index()] = data.parms_id()
            data = data.next_context_data() if data.chain_index() > 0 else None

    def encode(self, values: Floats, level: int, scale: float) -> Any:
        plain = seal.Plaintext()
        self.encoder.encode(values.tolist(), self.ids[level], scale, plain)
        return plain

    def load(self, kind: type, data: bytes, what: str) -> Any:
        loaded = kind()
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            path = Path(folder) / "object"
            path.write_bytes(data)
            try:
                loaded.load(self.context, str(path))
            # SEAL's errors come as RuntimeError, ValueError, IndexError or MemoryError, by where it stumbles.
            except (RuntimeError, ValueError, IndexError, MemoryError, OverflowError):
                raise EncryptedError(f"{what}: SEAL cannot read it for these parameters") from None
        return loaded


def _save(savable: Any) -> bytes:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder) / "object"
        savable.save(str(path))
        return path.read_bytes()


class SealSecretSide:
    """A fresh secret key and what can be done with it. It is not printed, copied or written anywhere."""

    def __init__(self, parameters: Parameters, steps: Sequence[int]) -> None:
        self._seal = _Seal(parameters)
        self._degree = parameters.degree
        self._steps = tuple(steps)
        self._generator = seal.KeyGenerator(self._seal.context)
        secret = self._generator.secret_key()
        self._encryptor = seal.Encryptor(self._seal.context, secret)
        self._decryptor = seal.Decryptor(self._seal.context, secret)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is not copied or written")

    def public_keys(self) -> tuple[bytes, ...]:
        """Public key, relinearisation key and just the rotation keys that are needed, each as bytes."""
        public = seal.PublicKey()
        self._generator.create_public_key(public)
        # SEAL's overload for steps is shadowed by the one for Galois elements: 3^step mod 2N.
        elements = [pow(3, step, 2 * self._degree) for step in self._steps]
        relinearisation, rotations = self._generator.create_relin_keys(), self._generator.create_galois_keys(elements)
        return _save(public), _save(relinearisation), _save(rotations)

    def encrypt(self, values: Floats) -> bytes:
        """Encrypt `slots` numbers under the secret key; half of the ciphertext is a seed."""
        plain = self._seal.encode(values, self._seal.top, self._seal.scale)
        return _save(self._encryptor.encrypt_symmetric(plain))

    def decrypt(self, answer: bytes) -> Floats:
        """Decrypt an answer into `slots` numbers.

        Raises: EncryptedError if it is not a ciphertext at the last level.
        """
        x = self._seal.load(seal.Ciphertext, answer, "answer")
        if x.parms_id() != self._seal.ids[0] or x.size() != 2:
            raise EncryptedError("answer: got a ciphertext of another level or size, expected one at the last level")
        plain = seal.Plaintext()
        self._decryptor.decrypt(x, plain)
        return np.asarray(self._seal.encoder.decode_double(plain), np.float64)


class SealServerSide:
    """Arithmetic under a client's public keys, with exact scales: every product ends at the query's own scale."""

    def __init__(self, parameters: Parameters, steps: Sequence[int], keys: Sequence[bytes]) -> None:
        self._seal = _Seal(parameters)
        if len(keys) != 3:
            raise EncryptedError(f"keys: got {len(keys)} parts, expected public, relinearisation and rotation keys")
        public = self._seal.load(seal.PublicKey, keys[0], "public key")
        self._relinearisation = self._seal.load(seal.RelinKeys, keys[1], "relinearisation key")
        self._rotations = self._seal.load(seal.GaloisKeys, keys[2], "rotation keys")
        missing = [s for s in steps if not self._rotations.has_key(pow(3, s, 2 * parameters.degree))]
        if missing:
            raise EncryptedError(f"rotation keys: got none for the steps {missing}, expected all of {list(steps)}")
        self._encryptor = seal.Encryptor(self._seal.context, public)
        self._evaluator = seal.Evaluator(self._seal.context)

    def read(self, query: bytes) -> Ciphertext:
        """Read a fresh query.

        Raises: EncryptedError unless it is a ciphertext of two parts at the top level and the right scale.
        """
        x = self._seal.load(seal.Ciphertext, query, "query")
        if x.parms_id() != self._seal.ids[self._seal.top] or x.size() != 2 or x.scale != self._seal.scale:
            raise EncryptedError("query: got a ciphertext of another level, size or scale, expected a fresh one")
        if x.is_transparent():
            raise EncryptedError("query: got a ciphertext that hides nothing, expected an encryption")
        return x

    def write(self, answer: Ciphertext) -> bytes:
        return _save(answer)

    def times(self, x: Ciphertext, values: Floats) -> Ciphertext:
        """Multiply slot by slot by plain numbers, one level down."""
        level = self._level(x)
        # Encoded at this scale, the product is at the query's scale exactly once the prime is divided out.
        plain = self._seal.encode(values, level, self._seal.scale * self._seal.primes[level] / x.scale)
        product = seal.Ciphertext()
        self._evaluator.multiply_plain(x, plain, product)
        self._evaluator.rescale_to_next_inplace(product)
        product.scale = self._seal.scale
        return product

    def plus(self, x: Ciphertext, values: Floats) -> Ciphertext:
        """Add plain numbers slot by slot."""
        total = seal.Ciphertext()
        self._evaluator.add_plain(x, self._seal.encode(values, self._level(x), x.scale), total)
        return total

    def square(self, x: Ciphertext) -> Ciphertext:
        """Square every slot, one level down; the scale is then off by prime / scale, which `times` mends."""
        result = seal.Ciphertext()
        self._evaluator.square(x, result)
        self._evaluator.relinearize_inplace(result, self._relinearisation)
        self._evaluator.rescale_to_next_inplace(result)
        return result

    def rotate_and_sum(self, x: Ciphertext, steps: Sequence[int]) -> Ciphertext:
        """Add to x its rotation by each step in turn: with steps 1, 2, 4, … slot i gets the sum of those after it."""
        total = x
        for step in steps:
            turned, added = seal.Ciphertext(), seal.Ciphertext()
            self._evaluator.rotate_vector(total, step, self._rotations, turned)
            self._evaluator.add(total, turned, added)
            total = added
        return total

    def rerandomise(self, x: Ciphertext) -> Ciphertext:
        """Add an encryption of zero under the client's public key."""
        zero, total = seal.Ciphertext(), seal.Ciphertext()
        self._encryptor.encrypt_zero(x.parms_id(), zero)
        zero.scale = x.scale
        self._evaluator.add(x, zero, total)
        return total

    def _level(self, x: Ciphertext) -> int:
        return int(x.coeff_modulus_size()) - 1


class TenSeal:
    """The real scheme: CKKS by SEAL, through TenSEAL's bindings."""

    def secret_side(self, parameters: Parameters, steps: Sequence[int]) -> SecretSide:
        return SealSecretSide(parameters, steps)

    def server_side(self, parameters: Parameters, steps: Sequence[int], keys: Sequence[bytes]) -> ServerSide:
        return SealServerSide(parameters, steps, keys)


class InsecureClear:
    """No encryption at all, the same arithmetic: what a circuit computes, without noise. For tests."""

    def secret_side(self, parameters: Parameters, steps: Sequence[int]) -> SecretSide:
        return self

    def server_side(self, parameters: Parameters, steps: Sequence[int], keys: Sequence[bytes]) -> ServerSide:
        return self

    def public_keys(self) -> tuple[bytes, ...]:
        return b"", b"", b""

    def encrypt(self, values: Floats) -> bytes:
        return values.astype("<f8").tobytes()

    def decrypt(self, answer: bytes) -> Floats:
        return np.frombuffer(answer, "<f8").astype(np.float64)

    def read(self, query: bytes) -> Ciphertext:
        return self.decrypt(query)

    def write(self, answer: Ciphertext) -> bytes:
        return self.encrypt(answer)

    def times(self, x: Ciphertext, values: Floats) -> Ciphertext:
        return x * values

    def plus(self, x: Ciphertext, values: Floats) -> Ciphertext:
        return x + values

    def square(self, x: Ciphertext) -> Ciphertext:
        return x * x

    def rotate_and_sum(self, x: Ciphertext, steps: Sequence[int]) -> Ciphertext:
        for step in steps:
            x = x + np.roll(x, -step)
        return x

    def rerandomise(self, x: Ciphertext) -> Ciphertext:
        return x
