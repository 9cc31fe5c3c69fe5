"""What an operation costs, in microseconds, from two measured primitives: a transform and a product of polynomials.

The counts are those of `evaluator`; the primitives were measured at N = 8192 on one core with AVX-512 and scale as
N log N and N. Only their ratio steers the search; `explain` shows prediction beside measurement.
"""

from dataclasses import dataclass

TRANSFORM_US = 16.0
PRODUCT_US = 2.2
REFERENCE_DEGREE = 8192


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs at one ring degree; `level` counts data primes."""

    degree: int

    @property
    def transform(self) -> float:
        return TRANSFORM_US * self.degree * self.degree.bit_length() / (REFERENCE_DEGREE * 14)

    @property
    def product(self) -> float:
        return PRODUCT_US * self.degree / REFERENCE_DEGREE

    def digits(self, level: int) -> float:
        return level * (level + 1) * self.transform

    def turn(self, level: int) -> float:
        return (2 * level * (level + 1) + 2 * level) * self.product

    def divide(self, level: int) -> float:
        """Divide by the special prime, or rescale to `level`."""
        return (2 + 2 * level) * self.transform + 2 * level * self.product

    def weigh(self, level: int, *, turned: bool) -> float:
        return 2 * (level + turned) * self.product

    def multiply(self, level: int) -> float:
        return self.digits(level) + self.turn(level) + self.divide(level) + 6 * level * self.product

    def linear(self, level: int, babies: int, giants: int, terms: int, sources: int) -> float:
        """Babies and giants count turns, without the shift by nothing."""
        if not babies and not giants:
            return terms * self.weigh(level, turned=False)
        total = terms * self.weigh(level, turned=True) + self.divide(level)
        total += (babies and sources * self.digits(level)) + babies * self.turn(level)
        return total + giants * (self.divide(level) + self.digits(level) + self.turn(level))

    def fold(self, level: int, steps: int) -> float:
        return self.digits(level) + steps * self.turn(level) + self.divide(level)
