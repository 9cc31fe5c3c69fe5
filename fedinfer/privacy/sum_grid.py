"""The grid of a sum modulo 2^bits: how many cells a unit is, and how far one neighbour moves the sum in them.

Three parts of a coordinate are sub-Gaussian whatever the parts before: the rotated sum Z with variance proxy
(s |Z|)² / d~ by the random signs (Hoeffding), its roundings with 1/4 a client, and the noise with its variance. With V
for the sum of the three, a coordinate is beyond t sqrt(V) with probability 2 exp(-t²/2) at most. The scale s is the
largest for which that, over all coordinates and steps, stays below 2^-40 at the edge of the modulus. Where a client
rounds until its norm fits, its rounding is conditioned on an event of probability 1 - `DOUBT` at least, and the bound
is raised for each client by so much.

The noise is sub-Gaussian because exp(tx) moves the middle of its law to t times its variance, and no middle gives the
weights a larger sum than an integer.

Reference: Kairouz, Liu and Steinke 2021, arXiv:2102.06387 (modular clipping).
"""

import math
from dataclasses import dataclass
from functools import cached_property

from fedinfer.privacy.rotation import padded_size
from fedinfer.privacy.rounding import likely_within, surely_within
from fedinfer.privacy.shares import gaussian_variance

# No coordinate of any step wraps but for a probability of 2^-40.
WRAP_BITS = 40
# A client's rounding is tried again with at most this probability.
DOUBT = 1e-3
# What the rotation's floating point may add to a sensitivity, as a part of it: for vectors up to `MOST_CLIPS` clip
# norms, whose transform errs by less than 1e-12 of their norm.
FLOATS, MOST_CLIPS = 1e-5, 1e6


@dataclass(frozen=True, kw_only=True)
class SumGrid:
    """At most `clients` vectors (dimension,), each of norm up to `most_norm` clip norms, summed in `steps` steps.

    `noise` is the standard deviation of `min_honest` shares together, in clip norms. `rounding_doubt` is the
    probability with which, in one step, the rounding of a difference of sums may exceed `sensitivity`; None where each
    vector's own rounding keeps to the bound.
    """

    dimension: int
    clients: int
    min_honest: int
    bits: int
    steps: int
    most_norm: float
    noise: float
    rounding_doubt: float | None

    @cached_property
    def padded(self) -> int:
        return padded_size(self.dimension)

    @cached_property
    def cells(self) -> float:
        """The clip norm in cells, rounded down to 20 binary digits; 0 if the modulus is too small for any."""
        doubt = self.clients * -math.log1p(-DOUBT) if self.rounding_doubt is None else 0.0
        t_squared = 2.0 * (math.log(2.0 * self.padded * self.steps) + WRAP_BITS * math.log(2.0) + doubt)
        room = (2.0 ** (self.bits - 1) - 1.0) ** 2 / t_squared - self.clients / 4.0
        if room <= 0.0:
            return 0.0
        data = (self.clients * self.most_norm) ** 2 / self.padded
        mantissa, exponent = math.frexp(math.sqrt(room / (data + self.clients * self.noise**2 / self.min_honest)))
        return math.ldexp(math.floor(math.ldexp(mantissa, 20)), exponent - 20)

    @property
    def share_variance(self) -> float:
        """Of one client's noise, in cells."""
        return (self.noise * self.cells) ** 2 / self.min_honest

    @property
    def rounded_norm(self) -> float:
        """What a client's rounded vector is held to, in cells."""
        return likely_within(self.cells, self.padded, doubt=DOUBT)

    @cached_property
    def sensitivity(self) -> float:
        """How far one neighbour moves the rounded sum in L2, in cells: but for `rounding_doubt` in each step."""
        if self.rounding_doubt is None:
            return self.rounded_norm * (1.0 + FLOATS)
        return likely_within(self.cells * (1.0 + FLOATS), self.padded, doubt=self.rounding_doubt)

    @cached_property
    def sure_sensitivity(self) -> float:
        """The same, in every case."""
        if self.rounding_doubt is None:
            return self.sensitivity
        return surely_within(self.cells * (1.0 + FLOATS), self.padded)

    def noise_multiplier(self, sensitivity: float) -> float:
        """The noise of `min_honest` shares, as a Gaussian's, over a sensitivity: what the account starts from."""
        return math.sqrt(gaussian_variance(share_variance=self.share_variance, shares=self.min_honest)) / sensitivity
