"""Interval plots as inline SVG: what was measured in each arm against the bound of the requirement, on one axis.

Positions are percentages of the width, so that a plot takes any width while its text and markers keep their size; colours
come from the page's style sheet, so that it follows light and dark and prints.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from paperclaims.reports.text import bounds, interval, number, power

NAMES = {"claim": "Claim", "control": "Control"}
SPAN = 1e3
CLEAR = 8.0  # per cent of the width that two marks need between them


@dataclass(frozen=True)
class Axis:
    """Maps values to per cent of the width. `kind`: linear, log, or symlog (linear within `unit` of zero)."""

    kind: str
    start: float
    stop: float
    unit: float = 1.0

    def scale(self, value: float) -> float:
        if self.kind == "log":
            return math.log10(value)
        return math.copysign(math.log10(1 + abs(value) / self.unit), value) if self.kind == "symlog" else value

    def at(self, value: float) -> float:
        """Per cent of the width, 4 to 96 for what the axis was made for, clipped to 0 and 100."""
        if not math.isfinite(value) or (self.kind == "log" and value <= 0):
            return 100.0 if value > 0 else 0.0
        share = (self.scale(value) - self.start) / (self.stop - self.start)
        return round(min(100.0, max(0.0, 4 + 92 * share)), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """A handful of positions in per cent, from left to right, and their labels."""
        if self.kind == "linear":
            digits = 2 + math.ceil(math.log10(max(abs(self.start), abs(self.stop)) / (self.stop - self.start)) + 1)
            found = _nice(self.start, self.stop, 5)
            if max(len(number(value, digits)) for value in found) > 6:
                found = _nice(self.start, self.stop, 4)
            return [(self.at(value), number(value, digits)) for value in found]
        if self.kind == "log":
            exponents = _thin(list(range(math.ceil(self.start - 1e-9), math.floor(self.stop + 1e-9) + 1)))
            return [(self.at(10.0**e), power(e)) for e in exponents]
        signed = {0.0: "0"}
        for sign, end in ((-1.0, -self.start), (1.0, self.stop)):
            largest = self.unit * (10 ** max(end, 1e-12) - 1)
            exponents = range(math.ceil(math.log10(self.unit)), math.floor(math.log10(largest)) + 1)
            signed |= {sign * 10.0**e: "−" * (sign < 0) + power(e) for e in _thin(list(exponents), 3)}
        apart = [v for v in sorted(signed) if v == 0 or abs(self.at(v) - self.at(0.0)) > 12]
        return [(self.at(v), signed[v]) for v in apart if self.start <= self.scale(v) <= self.stop]


def axis_for(requirements: Sequence[dict]) -> Axis:
    """The axis that shows how far each estimate is from its bounds.

    Where sizes span more than a factor of 1,000 that is a logarithmic one, unless it hides a difference that a linear one shows.
    With values at or below zero it is linear near zero, and used only where a linear one hides a difference.
    """
    limits = [r[side] for r in requirements for side in ("above", "below") if r[side] is not None]
    values = [r[key] for r in requirements for key in ("estimate", "low", "high") if math.isfinite(r[key])] + limits
    low, high = min(values), max(values)
    room = 0.0 if high > low else (abs(high) or 1.0) / 2
    linear = Axis("linear", low - room, high + room)
    sizes = [max(abs(r["low"]), abs(r["high"]), abs(r["estimate"])) for r in requirements] + [abs(value) for value in limits]
    sizes = [size for size in sizes if 0 < size < math.inf]
    if not sizes or max(sizes) / min(sizes) <= SPAN:
        return linear
    plain = _separation(linear, requirements)
    if low > 0:
        log = Axis("log", math.log10(low), math.log10(high))
        return log if _separation(log, requirements) >= min(plain, CLEAR) else linear
    unit = max(min([abs(limit) for limit in limits if limit] or sizes), 1e-16 * max(sizes))
    axis = Axis("symlog", 0, 1, unit)
    symlog = Axis("symlog", axis.scale(low), axis.scale(high), unit)
    return symlog if plain < min(CLEAR, _separation(symlog, requirements)) else linear


def _separation(axis: Axis, requirements: Sequence[dict]) -> float:
    """The least distance between an estimate and a bound of its own, in per cent of the width."""
    return min(
        abs(axis.at(found["estimate"]) - axis.at(found[side]))
        for found in requirements
        for side in ("above", "below")
        if found[side] is not None
    )


def interval_plot(quantity: str, groups: Sequence[tuple[str, dict[str, dict | None]]], must_break: bool = True) -> Markup:
    """One requirement as a figure.

    Args:
        quantity: its name.
        groups: for each set of parameters its label and, by arm, the requirement's record (or None).
        must_break: whether this is what the control has to contradict.
    """
    shown = [requirement for _, arms in groups for requirement in arms.values() if requirement]
    axis = axis_for(shown)
    unit = next((requirement["unit"] for requirement in shown if requirement["unit"]), "")
    parts = []
    previous = None
    for label, arms in groups:
        present = {arm: requirement for arm, requirement in arms.items() if requirement}
        if not present:
            continue
        first = next(iter(present.values()))
        if label:
            parts.append(f'<div class="setting">Setting {escape(label)}</div>')
        if _rule(first) != previous:
            parts.append(f'<div class="arm flag"><span></span>{_flag(axis, first)}</div>')
            previous = _rule(first)
        parts += [_row(axis, quantity, arm, requirement, must_break) for arm, requirement in present.items()]
    parts.append(f'<div class="arm ticks"><span></span>{_ticks(axis)}</div>')
    kind = {"linear": "", "log": "logarithmic axis", "symlog": "logarithmic axis, linear near zero"}[axis.kind]
    about = f" <span class=unit>in {escape(unit)}</span>" * bool(unit) + f" <span class=scale>{kind}</span>" * bool(kind)
    return Markup(f'<figure class="intervals"><figcaption><b>{escape(quantity)}</b>{about}</figcaption>{"".join(parts)}</figure>')


def curve_plots(settings: Sequence[tuple[str, dict[str, dict]]]) -> list[dict]:
    """Curves as plots, one per name and set of parameters, for the script that draws them.

    Args:
        settings: for each set of parameters its label and, by arm, the record.

    Returns:
        Dicts with title, setting, x_label, y_label, log, and series: name, arm, x, y, low, high. Where the control drew the same
        numbers as the claim arm, they appear once.
    """
    plots: dict[tuple, dict] = {}
    for label, arms in settings:
        for arm, record in arms.items():
            for curve in record["curves"]:
                about = {"title": curve["name"], "setting": label, **{key: curve[key] for key in ("x_label", "y_label", "log")}}
                plot = plots.setdefault((label, curve["name"]), about | {"series": []})
                series = {"name": curve["series"], **{key: curve[key] for key in ("x", "y", "low", "high")}}
                if not any(series == {key: known[key] for key in series} for known in plot["series"]):
                    plot["series"].append(series | {"arm": arm})
    return list(plots.values())


def _row(axis: Axis, quantity: str, arm: str, requirement: dict, must_break: bool) -> str:
    estimate, spread = interval(*(requirement[key] for key in ("estimate", "low", "high", "above", "below")))
    outcome = requirement["outcome"]
    measured = f"{estimate}, {requirement['level']:.0%} interval {spread}" if spread else f"{estimate} exactly"
    title = f"{NAMES[arm]} arm, {quantity}: {measured}; required {_rule(requirement)}: {outcome}"
    x = axis.at(requirement["estimate"])
    if requirement["low"] == requirement["high"]:
        mark = f'<svg x="{x}%" y="50%" class="mark"><path d="M0-7 7 0 0 7-7 0z"/></svg>'
    else:
        low, high = axis.at(requirement["low"]), axis.at(requirement["high"])
        caps = "".join(f'<line x1="{end}%" x2="{end}%" y1="11" y2="25"/>' for end in (low, high))
        mark = f'<g class="whisker"><line x1="{low}%" x2="{high}%" y1="18" y2="18"/>{caps}</g>'
        mark += f'<circle class="mark" cx="{x}%" cy="18" r="5"/>'
    return (
        f'<div class="arm {arm} {escape(outcome)}"><span class="name">{NAMES[arm]}</span>'
        f'<svg class="track" height="36" role="img"><title>{escape(title)}</title>{_side(axis, requirement)}{mark}</svg>'
        f'<span class="value"><b>{estimate}</b> <span class="spread">{spread}</span> '
        f'<span class="outcome">{escape(outcome)}{_expectation(arm, outcome, must_break)}</span></span></div>'
    )


def _expectation(arm: str, outcome: str, must_break: bool) -> str:
    """What the control's outcome means, where it is not plain."""
    if arm == "claim":
        return ""
    if not must_break:
        return ", need not break"
    return {"contradicted": ", as it must be", "met": ", should not be"}.get(outcome, "")


def _side(axis: Axis, requirement: dict) -> str:
    """The side that satisfies the requirement, shaded, and its edges."""
    edges = [axis.at(requirement[side]) for side in ("above", "below") if requirement[side] is not None]
    start, stop = _satisfied(axis, requirement)
    lines = "".join(f'<line class="bound" x1="{edge}%" x2="{edge}%" y1="0" y2="100%"/>' for edge in edges)
    return f'<rect class="satisfied" x="{start}%" width="{round(stop - start, 2)}%" height="100%"/>{lines}'


def _flag(axis: Axis, requirement: dict) -> str:
    """The bound in words where it stands on the axis, an arrow pointing to the side that satisfies it."""
    start, stop = _satisfied(axis, requirement)
    rule = escape(_rule(requirement))
    if requirement["above"] is None:
        x, anchor, text = stop, "start" if stop < 30 else "end", f"← {rule}"
    elif requirement["below"] is None:
        x, anchor, text = start, "end" if start > 70 else "start", f"{rule} →"
    else:
        x = (start + stop) / 2
        anchor, text = "start" if x < 25 else "end" if x > 75 else "middle", rule
    words = f'<text x="{round(x, 2)}%" y="13" text-anchor="{anchor}">{text}</text>'
    return f'<svg class="track" height="18" aria-hidden="true">{words}</svg>'


def _ticks(axis: Axis) -> str:
    marks = []
    for x, label in axis.ticks():
        anchor = "start" if x < 6 else "end" if x > 94 else "middle"
        marks.append(f'<line x1="{x}%" x2="{x}%" y1="0" y2="5"/><text x="{x}%" y="18" text-anchor="{anchor}">{label}</text>')
    return f'<svg class="track" height="22" aria-hidden="true"><line x1="0" x2="100%" y1=".5" y2=".5"/>{"".join(marks)}</svg>'


def _satisfied(axis: Axis, requirement: dict) -> tuple[float, float]:
    start = 0.0 if requirement["above"] is None else axis.at(requirement["above"])
    return start, 100.0 if requirement["below"] is None else axis.at(requirement["below"])


def _rule(requirement: dict) -> str:
    return bounds(requirement["above"], requirement["below"], requirement["unit"])


def _nice(start: float, stop: float, most: int) -> list[float]:
    """Two to `most` (at least four) round values between `start` and `stop`."""
    magnitude = 10.0 ** math.floor(math.log10((stop - start) / most))
    for step in (magnitude * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        first, last = math.ceil(start / step - 1e-9), math.floor(stop / step + 1e-9)
        if last - first < most:
            break
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def _thin(values: list[int], most: int = 5) -> list[int]:
    """Every k-th value, counted from the last, so that at most `most` remain."""
    stride = max(1, math.ceil(len(values) / most))
    return values[::-1][::stride][::-1]
