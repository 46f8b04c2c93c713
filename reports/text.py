"""Numbers as a reader wants to see them: few digits, real minus signs, powers of ten only where they help."""

import math

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 4) -> str:
    """`value` to `digits` significant digits; whole numbers below 10¹² in full."""
    value = float(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == int(value) and abs(value) < 1e12:
        return _minus(f"{value:,.0f}")
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
        return _minus(text.rstrip("0").rstrip(".") if "." in text else text)
    mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return _minus({"1": "", "-1": "-"}.get(mantissa, f"{mantissa}×")) + power(int(exponent))


def power(exponent: int) -> str:
    """A power of ten: 10⁻³, 1, 10, 100, 10⁶."""
    return {0: "1", 1: "10", 2: "100"}.get(exponent, f"10{str(exponent).translate(SUPERSCRIPTS)}")


def interval(estimate: float, low: float, high: float, *limits: float | None) -> tuple[str, str]:
    """The estimate and its interval, with the digits that the interval's width justifies; no interval for an exact number.

    An end that would round to one of `limits` gets more digits, so that the reader sees on which side it lies.
    """
    if low == high:
        return number(estimate, 6), ""
    largest, width = max(abs(low), abs(high)), high - low
    if width < 1e-6 * largest:
        return number(estimate, 6), f"± {number(width / 2, 3)}"
    if largest >= 1e6 or largest < 1e-3:
        return number(estimate), f"[{number(low)}, {number(high)}]"
    decimals = min(9, max(0, 1 - math.floor(math.log10(width))))
    while decimals < 9 and any(round(end, decimals) == limit != end for end in (low, high) for limit in limits):
        decimals += 1
    shown = [_minus(f"{value:,.{decimals}f}") for value in (estimate, low, high)]
    return shown[0], f"[{shown[1]}, {shown[2]}]"


def bounds(above: float | None, below: float | None, unit: str = "") -> str:
    """A requirement in words."""
    unit = f" {unit}" if unit else ""
    low, high = (None if bound is None else number(bound, 7) for bound in (above, below))
    if low is not None and high is not None:
        return f"exactly {low}{unit}" if above == below else f"{low} to {high}{unit}"
    return f"at least {low}{unit}" if high is None else f"at most {high}{unit}"


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90 * 60:
        return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def percent(share: float, digits: int = 0) -> str:
    """A share in per cent; 0 and 100 stand for none and all, never for nearly none or nearly all."""
    least = 10.0**-digits
    if 0 < share < least / 100:
        return f"<{least:g} %"
    return f">{100 - least:g} %" if 1 - least / 100 < share < 1 else f"{100 * share:.{digits}f} %"


def signed(share: float | None) -> str:
    """A relative change: +3.2 %, −18 %, ×40 from a factor of three on; "from 0" where there is nothing to compare with."""
    if share is None:
        return "from 0"
    if share >= 2:
        return f"×{number(1 + share, 3)}"
    return f"{'−' if share < 0 else '+'}{number(100 * abs(share), 2)} %"


def bytes_(count: float) -> str:
    """Bytes in the unit that keeps the number short: 512 B, 24.5 KiB, 1.2 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, math.frexp(count)[1] - 1) // 10) if count else 0
    return f"{number(count / 2 ** (10 * power), 3)} {units[power]}"


def seconds(value: float) -> str:
    """Seconds in the unit that keeps the number short."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{number(value / scale, 3)} {unit}"
    return f"{number(value / 1e-9, 3)} ns"


def widths(margin: float | None) -> str:
    """A margin in interval widths."""
    if margin is None:
        return "exact"
    return "> 100" if margin > 100 else f"{margin:.1f}" if margin >= 0.1 or margin == 0 else f"{margin:.2f}"


def _minus(text: str) -> str:
    return text.replace("-", "−")
