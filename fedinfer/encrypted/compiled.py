"""A compiled network: what is public of it, and the plan that its server runs, on disk and in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.encrypted.circuit import PrivateCircuit, PublicCircuit, execute
from fedinfer.encrypted.clear import InsecureClear
from fedinfer.encrypted.scheme import Scheme
from fedinfer.errors import BadUsage

if TYPE_CHECKING:
    from fedinfer.encrypted.explain import Explanation
    from fedinfer.encrypted.verify import Verification

Floats = NDArray[np.float64]
Encoded = Mapping[int, tuple[list[Any], list[Any]]]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A network ready to be served: `public` for everyone, `private` for the server alone.

    `rows` are the calibration data, flat, for `verify`; they are not saved. `encoded` are the weights as plaintexts.
    """

    public: PublicCircuit
    private: PrivateCircuit = field(repr=False)
    rows: tuple[Floats, ...] = field(repr=False, default=())
    encoded: Encoded | None = field(repr=False, default=None)

    def encode(self, scheme: Scheme) -> Encoded:
        """The weights as plaintexts of `scheme`."""
        return self.private.encode(scheme.encoder(self.public.parameters), self.public.parameters)

    def save(self, path: Path | str) -> None:
        """Write the server's plan with its weights encoded, at once: private, for the server alone."""
        from fedinfer.encrypted.plan_file import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a plan.

        Raises: ModelFileError if there is no such file, or it is not a whole plan of this format.
        """
        from fedinfer.encrypted.plan_file import load

        public, private, encoded = load(Path(path))
        return cls(public=public, private=private, encoded=encoded)

    def explain(self) -> "Explanation":
        """A table, layer by layer: layout, level, scale, rotations, milliseconds predicted and measured, error."""
        from fedinfer.encrypted.explain import explain

        return explain(self)

    def verify(self, features: Any = None, *, rows: int = 1000, encrypted_rows: int = 8) -> "Verification":
        """Compare exact answers to `rows` inputs with noisy ones in the clear and, for the first few, under CKKS.

        Without `features` the inputs lie between pairs of calibration rows.
        Raises: BadUsage if there is neither.
        """
        from fedinfer.encrypted.verify import verify

        arguments = self.sample(rows) if features is None else self.public.flat(features)
        return verify(self, arguments, encrypted_rows=encrypted_rows)

    def sample(self, count: int) -> list[Floats]:
        """Flat features (count, size) for each input: points between two calibration rows, by a fixed seed.

        Raises: BadUsage for a plan read from a file, which has no calibration rows.
        """
        if not self.rows:
            raise BadUsage("plan: got no calibration rows, which a file does not hold; give features")
        generator = np.random.default_rng(0)
        one, two = generator.integers(0, len(self.rows[0]), (2, count))
        share = generator.uniform(size=(count, 1))
        return [rows[one] * share + rows[two] * (1 - share) for rows in self.rows]

    def simulate(self, arguments: Sequence[Floats], *, noise: int | None) -> Floats:
        """Answers (n, outputs) to flat features on the clear scheme: fixed point, with noise of the size of CKKS's.

        `noise` is a seed, or None for exact arithmetic.
        """
        return self.answered(arguments, InsecureClear(noise), flood=0.0)

    def answered(self, arguments: Sequence[Floats], scheme: Scheme, *, flood: float) -> Floats:
        """Answers (n, outputs) to flat features under `scheme`, with fresh keys, in this process."""
        public = self.public
        secret = scheme.secret_side(public.parameters, public.keys)
        side = scheme.server_side(public.parameters, public.keys, secret.public_keys())
        encoded, numbers = self.encode(scheme), []
        parts = [side.read(secret.encrypt(slots)) for slots in public.pack(arguments)]
        for start in range(0, len(parts), public.ciphertexts):
            answers = execute(self.private, encoded, side, public.split(parts[start : start + public.ciphertexts]))
            written = [side.write(answer, outputs=public.classes, flood=flood) for answer in answers]
            numbers += [secret.decrypt(data, outputs=public.classes, scale=public.scale) for data in written]
        return public.unpack(numbers, len(arguments[0])) if numbers else np.zeros((0, public.outputs))
