"""Numbers as a reader wants them: few digits, a unit, and never a privacy loss rounded down."""

from decimal import ROUND_CEILING, Decimal

NO_BREAK = "\u00a0"
MINUS = "\u2212"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits; very small and very large ones with a power of ten.

    >>> significant(0.20371), significant(1234.5), significant(-2.0)
    ('0.204', '1,234', '−2')
    >>> significant(1e-05), significant(3.14e-7)
    ('10⁻⁵', '3.1\xa0×\xa010⁻⁷')
    """
    if value < 0:
        return MINUS + significant(-value, digits)
    if value != 0 and not 1e-4 <= value < 1e6:
        return _power(value)
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    power = "10" + str(int(exponent)).translate(SUPERSCRIPT)
    digits = mantissa.removesuffix(".0")
    return power if digits == "1" else f"{digits}{NO_BREAK}×{NO_BREAK}{power}"


def privacy_loss(value: float) -> str:
    """ε with three significant digits.

    Guarantees: what is shown is never less than `value`.

    >>> privacy_loss(1.99987), privacy_loss(1.2301), privacy_loss(8.0)
    ('2', '1.24', '8')
    """
    exact = Decimal(repr(value))
    if not exact:
        return "0"
    step = Decimal(1).scaleb(exact.adjusted() - 2)
    return f"{exact.quantize(step, ROUND_CEILING).normalize():f}"


def milliseconds(value: float) -> str:
    """A duration; below a tenth in microseconds, from two seconds on in seconds.

    >>> milliseconds(0.2113), milliseconds(0.03114), milliseconds(2345.6)
    ('0.211\\xa0ms', '31.1\\xa0µs', '2.35\\xa0s')
    """
    if 0 < value < 0.1:
        return significant(value * 1000) + NO_BREAK + "µs"
    return significant(value) + NO_BREAK + "ms" if value < 2000 else seconds(value / 1000)


def seconds(value: float) -> str:
    """A duration; from two minutes on in minutes.

    >>> seconds(14.04), seconds(272)
    ('14\\xa0s', '4\\xa0min 32\\xa0s')
    """
    if value < 120:
        return significant(value) + NO_BREAK + "s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes}{NO_BREAK}min {rest}{NO_BREAK}s"


def size(value: float) -> str:
    """Bytes in decimal units.

    >>> size(812), size(11_240), size(3_400_000)
    ('812\\xa0B', '11.2\\xa0kB', '3.4\\xa0MB')
    """
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return significant(value) + NO_BREAK + unit
        value /= 1000
    return significant(value) + NO_BREAK + "GB"


def rate(value: float) -> str:
    """A score between 0 and 1 with three decimals."""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """A difference with three decimals and its sign.

    >>> signed(0.0341), signed(-0.02)
    ('+0.034', '−0.020')
    """
    return f"{value:+.3f}".replace("-", MINUS)
