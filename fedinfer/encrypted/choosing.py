"""Which chain of primes and which packing: the cheapest by the cost of what the server does."""

from collections.abc import Mapping

from fedinfer.encrypted.chain import Chain, Chains
from fedinfer.encrypted.costs import Costs
from fedinfer.encrypted.frames import packed_bytes
from fedinfer.encrypted.graph import Affine, Input, Product, Value, in_order
from fedinfer.encrypted.keys import KeyPlan
from fedinfer.encrypted.packing import Gathered
from fedinfer.encrypted.search import Packing, Search
from fedinfer.errors import CompileError

DEGREES = (2048, 4096, 8192, 16384, 32768)
# Chains at one degree whose layouts are searched: the cheapest by their levels, and not much more than the cheapest.
PRICED = 6
MAX_EFFORT = 1.5
# What a byte of a key costs in microseconds, for it is sent once, and the share of the budget that a search may use.
# The beam keeps what is fast; where that leaves no room for later keys, the later pairs make small keys count for more.
KEY_US_AND_SHARE = ((2e-4, 1.0), (4e-3, 1.0), (8e-2, 1.0), (8e-2, 0.6), (8e-2, 0.35))
# What a byte of a query costs a server that has thousands of rows to read, in microseconds.
READ_US = 2e-3


def choose(
    output: Value, depths: Mapping[Value, int], chains: Chains, *, precision: float, share: float, budget: int,
    wide: bool, known: dict[object, Gathered | None],
) -> tuple[Chain, Packing | None]:  # fmt: skip
    """The cheapest chain with its packing, or without one if every element has a ciphertext (`wide`).

    `share` is how many slots an output may be the sum of; `known` keeps what was gathered for searches to come.
    Raises: CompileError naming the layer for a depth that fits no ring, or for which no packing fits.
    """
    found = chains.within(precision, share)
    if not found:
        layer = max((v for v in depths if not isinstance(v, Input)), key=lambda v: depths[v]).name
        missing = chains.missing_bits()
        if missing is None:
            raise CompileError(f"layer {layer}: no chain of primes gives a precision of {precision:.1g}; ask for less")
        raise CompileError(
            f"layer {layer}: got a depth of {depths[output]}, which needs {missing} bits more than a ring of degree "
            f"32768 has; use fewer layers, a lower activation_degree or a larger precision"
        )
    if wide:
        return min(found, key=lambda chain: _wide_us(output, depths, chain)), None
    return _packed(output, depths, found, budget, known)


def _wide_us(output: Value, depths: Mapping[Value, int], chain: Chain) -> float:
    """Microseconds a row, when there is a row for every slot."""
    parameters, costs = chain.parameters, Costs(degree=chain.parameters.degree)
    total = 0.0
    for value in in_order(output):
        level, lowered = chain.before[depths[value]], chain.after[depths[value]]
        dropped = sum(costs.divide(to) for to in range(lowered, level))
        if isinstance(value, Input):
            total += value.size * READ_US * packed_bytes(parameters.primes[: parameters.levels], parameters.degree)
        elif isinstance(value, Product):
            total += value.size * (costs.multiply(level) + dropped)
        elif isinstance(value, Affine):
            entries = sum(matrix.nnz for _, matrix in value.sources)
            total += entries * costs.weigh(level, turned=False) / 4 + value.size * dropped
    return total / parameters.slots


def _packed(
    output: Value, depths: Mapping[Value, int], found: list[Chain], budget: int, known: dict[object, Gathered | None]
) -> tuple[Chain, Packing]:
    best: tuple[float, Chain, Packing] | None = None
    failure: CompileError | None = None
    for degree in sorted({chain.parameters.degree for chain in found}):
        if best is not None and degree >= 16384:
            break
        here = [chain for chain in found if chain.parameters.degree == degree]
        for chain in here[:PRICED]:
            if chain.effort[1] > MAX_EFFORT * here[0].effort[1]:
                break
            try:
                packing = _pack(output, depths, chain, budget, known)
            except CompileError as error:
                failure = error
                continue
            if best is None or packing.cost_us < best[0]:
                best = (packing.cost_us, chain, packing)
    if best is None:
        assert failure is not None
        raise failure
    return best[1], best[2]


def _pack(
    output: Value,
    depths: Mapping[Value, int],
    chain: Chain,
    budget: int,
    known: dict[object, Gathered | None],
) -> Packing:
    parameters = chain.parameters
    size = {
        level: KeyPlan(answer=1, relinearisation=level, rotations=()).size_bytes(parameters)
        for level in range(1, parameters.levels + 1)
    }
    products = [chain.before[depth] for value, depth in depths.items() if isinstance(value, Product)]
    if not parameters.special and products:
        raise CompileError("a product needs a key-switching prime")
    room = budget - size.get(max(products, default=0), 0) if parameters.special else 0
    for key_us, share in KEY_US_AND_SHARE:
        search = Search(
            output,
            {value: (chain.before[depth], chain.after[depth]) for value, depth in depths.items()},
            degree=parameters.degree,
            key_bytes=size,
            query_bytes=packed_bytes(parameters.primes[: parameters.levels], parameters.degree),
            key_budget_bytes=int(room * share),
            key_us=key_us,
            known=known,
        )
        try:
            return search.best()
        except CompileError as error:
            failure = error
            if not parameters.special:
                break
    raise failure
