"""Which chain of primes and which packing: the cheapest by the cost of what the server does."""

from collections.abc import Mapping

from fedinfer.encrypted.chain import Chain, chains, missing_bits
from fedinfer.encrypted.costs import Costs
from fedinfer.encrypted.frames import packed_bytes
from fedinfer.encrypted.graph import Affine, Input, Product, Value, in_order
from fedinfer.encrypted.keys import KeyPlan
from fedinfer.encrypted.packing import Gathered
from fedinfer.encrypted.search import Packing, Search
from fedinfer.errors import CompileError

DEGREES = (2048, 4096, 8192, 16384, 32768)
# Chains whose layouts are searched: the cheapest by their levels alone, at the least degrees that fit.
PRICED = 6
PRICED_DEGREES = 2
# What a byte of a query costs a server that has thousands of rows to read, in microseconds.
READ_US = 2e-3


def choose(
    output: Value, depths: Mapping[Value, int], precision: float, budget: int, *, wide: bool
) -> tuple[Chain, Packing | None]:
    """The cheapest chain with its packing, or without one if every element has a ciphertext (`wide`).

    Raises: CompileError naming the layer for a depth that fits no ring, or for which no packing fits.
    """
    found = chains(output, depths, precision=precision, degrees=DEGREES, wide=wide)
    if not found:
        layer = max((v for v in depths if not isinstance(v, Input)), key=lambda v: depths[v]).name
        missing = missing_bits(output, depths)
        if missing is None:
            raise CompileError(f"layer {layer}: no chain of primes gives a precision of {precision:.1g}; ask for less")
        raise CompileError(
            f"layer {layer}: got a depth of {depths[output]}, which needs {missing} bits more than a ring of degree "
            f"32768 has; use fewer layers, a lower activation_degree or a larger precision"
        )
    if wide:
        return min(found, key=lambda chain: _wide_us(output, depths, chain)), None
    return _packed(output, depths, found, budget)


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


def _packed(output: Value, depths: Mapping[Value, int], found: list[Chain], budget: int) -> tuple[Chain, Packing]:
    best: tuple[float, Chain, Packing] | None = None
    failure: CompileError | None = None
    tried: set[int] = set()
    known: dict[object, Gathered | None] = {}
    for degree in DEGREES:
        for chain in [c for c in found if c.parameters.degree == degree][:PRICED]:
            try:
                packing = _pack(output, depths, chain, budget, known)
            except CompileError as error:
                failure = error
                continue
            tried.add(degree)
            if best is None or packing.cost_us < best[0]:
                best = (packing.cost_us, chain, packing)
        if len(tried) >= PRICED_DEGREES or (best is not None and degree >= 16384):
            break
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
        level: KeyPlan(relinearisation=level, rotations=()).size_bytes(parameters)
        for level in range(1, parameters.levels + 1)
    }
    search = Search(
        output,
        {value: (chain.before[depth], chain.after[depth]) for value, depth in depths.items()},
        degree=parameters.degree,
        key_bytes=size,
        query_bytes=packed_bytes(parameters.primes[: parameters.levels], parameters.degree),
        key_budget_bytes=budget if parameters.special else 0,
        known=known,
    )
    packing = search.best()
    if not parameters.special and any(isinstance(value, Product) for value in depths):
        raise CompileError("a product needs a key-switching prime")
    return packing
