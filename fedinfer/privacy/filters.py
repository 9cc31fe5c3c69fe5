"""Filters: how much may be charged to a budget when each charge is chosen after seeing the releases before it.

An accountant that looks for the best bound after the fact is right for a list of plans fixed in advance, and wrong for
a server that chooses the next plan by the last answer. A filter is right for both: its rule is fixed before the first
row is read, and says of each charge, before it is made, whether it still fits. The three rules here:

* `BasicFilter` adds ε and adds δ. It takes every charge, and a plan fixed in advance enters with the ε of its tight
  account (privacy loss distributions). Best for a few large plans.
  Reference: Rogers, Roth, Ullman and Vadhan 2016, arXiv:1605.08294, Theorem 5.1 (its first part).
* `RenyiFilter` adds Rényi divergences at one order. Best for many small charges of any kind.
  References: Feldman and Zrnic 2021, arXiv:2008.11193, Theorem 3.1; Lécuyer 2021, arXiv:2103.01379.
* `GaussianFilter` adds μ² of Gaussian mechanisms, without any loss for these. It takes nothing else.
  References: Koskela, Tobaben and Honkela 2023, arXiv:2209.15596; Smith and Thakurta 2022, arXiv:2210.17520.

Why one order: at a fixed order the exponential moment of the privacy loss, divided by what was charged for, cannot
grow in expectation, whatever is chosen next; so the sum of charges bounds it, at any stopping time. A rule that asks
for *some* order at which the sum fits lets the answers choose the order: each order then bounds its own tail, and
their union costs δ once for each.

Sums are exact: a number counts as the decimal that is written in the ledger, so that 0.1 + 0.2 fills 0.3 and not a
hair more.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Protocol, Self

from fedinfer.errors import BadUsage, BudgetExceeded, LedgerError
from fedinfer.privacy.checks import check_delta, check_epsilon
from fedinfer.privacy.conversions import gdp_delta, rdp_overhead

FilterName = Literal["basic", "renyi", "gdp"]
# A limit computed in floating point is taken this much smaller: far more than its rounding error.
ROUND_DOWN = 1.0 - 1e-9
# Beyond it exp(ε) is no float, and nobody is protected either.
MAX_EPSILON = 500.0
# Noise on a grid is Gaussian up to a factor of exp(1e-8) in each charge (`plan.py`); room is left for this many.
MAX_GAUSSIANS = 1000
GRID_ROOM = 1e-5
ORDERS = (
    *(1.0 + hundredth / 100.0 for hundredth in range(1, 200)),
    *(tenth / 10.0 for tenth in range(30, 320)),
    *(float(order) for order in range(32, 128)),
    *(float(round(128 * 1.02**power)) for power in range(400)),
)


class Charge(Protocol):
    """What a ledger needs to know of a plan or of a single release: at most `steps` releases, and what all cost."""

    @property
    def steps(self) -> int: ...
    @property
    def delta(self) -> float: ...
    def epsilon(self) -> float:
        """ε of all steps at `delta`."""
        ...

    def rdp(self, order: float) -> float:
        """The Rényi divergence of all steps at `order` above 1; infinity if it is not bounded."""
        ...

    def gdp(self) -> float | None:
        """μ if all steps together are μ-Gaussian DP, None if they are not."""
        ...

    def digest(self) -> str: ...
    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Exact sums over what was charged."""

    count: int = 0
    epsilon: Fraction = Fraction(0)
    delta: Fraction = Fraction(0)
    rdp: Fraction = Fraction(0)
    mu_squared: Fraction = Fraction(0)

    def plus(self, cost: Mapping[str, float]) -> "Spent":
        """The sums with one more charge.

        >>> spent = Spent().plus({"epsilon": 0.1, "delta": 1e-6}).plus({"epsilon": 0.2, "delta": 1e-6})
        >>> spent.epsilon == exact(0.3), 0.1 + 0.2 == 0.3
        (True, False)
        """
        return Spent(
            count=self.count + 1,
            epsilon=self.epsilon + exact(cost["epsilon"]),
            delta=self.delta + exact(cost["delta"]),
            rdp=self.rdp + exact(cost.get("rdp", 0.0)),
            mu_squared=self.mu_squared + exact(cost.get("mu", 0.0)) ** 2,
        )


class Filter(Protocol):
    """A rule of composition with its limit, fixed when a ledger is made."""

    def cost(self, charge: Charge) -> dict[str, float]:
        """What is written down of a charge: its ε and δ, and what this rule adds up.

        Raises: BudgetExceeded for a charge that this rule can never take; LedgerError for numbers that cannot be.
        """
        ...

    def check(self, spent: Spent, cost: Mapping[str, float]) -> None:
        """Raises: BudgetExceeded unless `cost` fits beside what was `spent`."""
        ...

    def total(self, spent: Spent) -> tuple[float, float]:
        """The (ε, δ) that what was `spent` stands for, by this rule alone."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class BasicFilter:
    """The sum of ε at most `epsilon`, and the sum of δ at most `delta`.

    Guarantees: the releases of any charges that pass, chosen adaptively, are together (epsilon, delta)-private.
    """

    epsilon: float
    delta: float

    @classmethod
    def of(cls, epsilon: float, delta: float) -> Self:
        return cls(epsilon=epsilon, delta=delta)

    def cost(self, charge: Charge) -> dict[str, float]:
        return _stated(charge)

    def check(self, spent: Spent, cost: Mapping[str, float]) -> None:
        after = spent.plus(cost)
        _fits("epsilon", spent.epsilon, after.epsilon, exact(self.epsilon))
        _fits("delta", spent.delta, after.delta, exact(self.delta))

    def total(self, spent: Spent) -> tuple[float, float]:
        return round_up(spent.epsilon), round_up(spent.delta)

    def to_json(self) -> dict[str, Any]:
        return {"name": "basic"}


@dataclass(frozen=True, kw_only=True)
class RenyiFilter:
    """The sum of Rényi divergences at `order` at most `limit`.

    Guarantees: the releases of any charges that pass, chosen adaptively, are together (order, limit)-Rényi private,
    and so (epsilon, delta)-private for the budget that `of` was given.
    Reference: the conversion is Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12.
    """

    delta: float
    order: float
    limit: float

    @classmethod
    def of(cls, epsilon: float, delta: float) -> Self:
        """The order at which most Gaussian releases fit into (epsilon, delta): the largest limit/order.

        A Gaussian release costs order/(2σ²). Subsampled ones cost less at small orders and more at large ones, but
        near the same best order as long as the budget is spent on many of them.
        """

        def limit(order: float) -> float:
            return (epsilon - rdp_overhead(order, delta)) * ROUND_DOWN

        order = max(ORDERS, key=lambda order: limit(order) / order)
        if limit(order) <= 0.0:
            raise BadUsage(
                f"epsilon: got {epsilon:g} at delta {delta:g}, too little for the filter renyi; use basic or gdp"
            )
        return cls(delta=delta, order=order, limit=limit(order))

    def cost(self, charge: Charge) -> dict[str, float]:
        divergence = charge.rdp(self.order)
        if divergence == math.inf:
            raise BudgetExceeded(
                f"rdp: got no bound at order {self.order:g} for {type(charge).__name__}; nothing was released or "
                "spent. Charge it to a ledger with the filter basic"
            )
        return {**_stated(charge), "rdp": _number("rdp", divergence)}

    def check(self, spent: Spent, cost: Mapping[str, float]) -> None:
        _fits("rdp", spent.rdp, spent.plus(cost).rdp, exact(self.limit))

    def total(self, spent: Spent) -> tuple[float, float]:
        if spent.rdp == 0:
            return 0.0, 0.0
        return max(0.0, round_up(spent.rdp) + rdp_overhead(self.order, self.delta)), self.delta

    def to_json(self) -> dict[str, Any]:
        return {"name": "renyi", "order": self.order, "limit": self.limit}


@dataclass(frozen=True, kw_only=True)
class GaussianFilter:
    """The sum of μ² of Gaussian mechanisms at most `limit`².

    Guarantees: the releases of any charges that pass, chosen adaptively, are together limit-Gaussian private, and so
    (epsilon, delta)-private for the budget that `of` was given.
    """

    delta: float
    limit: float

    @classmethod
    def of(cls, epsilon: float, delta: float) -> Self:
        """The largest μ that is (epsilon, delta)-private, but for the room that noise on a grid needs.

        Raises: BadUsage for an epsilon outside of 0.001 to 500.
        """
        if not 1e-3 <= epsilon <= MAX_EPSILON:
            raise BadUsage(f"epsilon: got {epsilon:g}, expected 0.001 to {MAX_EPSILON:g} with the filter gdp")
        least = delta * (1.0 - GRID_ROOM)
        return cls(delta=delta, limit=_border(lambda mu: gdp_delta(mu, epsilon - GRID_ROOM) <= least) * ROUND_DOWN)

    def cost(self, charge: Charge) -> dict[str, float]:
        mu = charge.gdp()
        if mu is None:
            raise BudgetExceeded(
                f"gdp: got {type(charge).__name__}, which is no Gaussian mechanism (sampling makes it none), expected "
                "one; nothing was released or spent. Charge it to a ledger with the filter basic or renyi, or plan "
                "without sampling"
            )
        return {**_stated(charge), "mu": _number("mu", mu)}

    def check(self, spent: Spent, cost: Mapping[str, float]) -> None:
        _fits("number of charges", Fraction(spent.count), Fraction(spent.count + 1), Fraction(MAX_GAUSSIANS))
        _fits("mu²", spent.mu_squared, spent.plus(cost).mu_squared, exact(self.limit) ** 2)

    def total(self, spent: Spent) -> tuple[float, float]:
        if spent.mu_squared == 0:
            return 0.0, 0.0
        mu = math.sqrt(round_up(spent.mu_squared))
        least = self.delta * (1.0 - GRID_ROOM)
        return _border(lambda epsilon: gdp_delta(mu, epsilon) > least) / ROUND_DOWN + GRID_ROOM, self.delta

    def to_json(self) -> dict[str, Any]:
        return {"name": "gdp", "limit": self.limit}


def choose_filter(name: str, *, epsilon: float, delta: float) -> Filter:
    """The filter `name` for a budget.

    Raises: BadUsage for a budget that cannot be, or has no limit by this filter, and for a name that is none.

    >>> choose_filter("renyi", epsilon=3.0, delta=1e-5).to_json()["order"]
    7.5
    """
    check_epsilon(epsilon)
    check_delta(delta)
    if name == "basic":
        return BasicFilter.of(epsilon, delta)
    if name == "renyi":
        return RenyiFilter.of(epsilon, delta)
    if name == "gdp":
        return GaussianFilter.of(epsilon, delta)
    raise BadUsage(f"filter: got {name!r}, expected basic, renyi or gdp")


def filter_from_json(fields: Mapping[str, Any], *, epsilon: float, delta: float) -> Filter:
    """The filter of a ledger, with the numbers that were written down when it was made.

    Raises: LedgerError for a filter that is not known.
    """
    match fields:
        case {"name": "basic"}:
            return BasicFilter(epsilon=epsilon, delta=delta)
        case {"name": "renyi", "order": float(order), "limit": float(limit)}:
            return RenyiFilter(delta=delta, order=order, limit=limit)
        case {"name": "gdp", "limit": float(limit)}:
            return GaussianFilter(delta=delta, limit=limit)
    raise LedgerError("filter: got one that this version does not know; update fedinfer")


def exact(value: float) -> Fraction:
    """The decimal that a float is written as."""
    return Fraction(repr(value))


def _number(name: str, value: float) -> float:
    number = float(value)
    if not 0.0 <= number < math.inf:
        raise LedgerError(f"{name}: got {number}, expected a finite number of at least 0; nothing was spent")
    return number


def _stated(charge: Charge) -> dict[str, float]:
    return {"epsilon": _number("epsilon", charge.epsilon()), "delta": _number("delta", charge.delta)}


def _fits(name: str, before: Fraction, after: Fraction, limit: Fraction) -> None:
    if after > limit:
        raise BudgetExceeded(
            f"{name}: got a plan of {float(after - before):.6g} with {float(before):.6g} of {float(limit):.6g} spent; "
            "nothing was released or spent. The data holder decides whether to enrol anew"
        )


def round_up(value: Fraction) -> float:
    """A float that is not written smaller than `value`."""
    number = float(value)
    return number if exact(number) >= value else math.nextafter(number, math.inf)


def _border(holds: Callable[[float], bool]) -> float:
    """The positive number up to which `holds`, which is so for small ones only."""
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2.0 * high
    while high - low > 1e-12 * high and high > 1e-300:
        middle = (low + high) / 2.0
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high
