"""Plots and numbers: drawn so that a reader sees on which side of its threshold an interval lies."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.fixtures.protocol import Requirement
from paperclaims.fixtures.statistics import Interval
from paperclaims.reports import model, plots, text


def requirement(estimate, low, high, above=None, below=None) -> dict:
    return Requirement("q", Interval(estimate, low, high, 8), above, below).as_dict()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (requirement(5, 4, 6, above=3), 0.5),
        (requirement(5, 4, 6, below=3), 0.5),
        (requirement(5, 4, 6, above=5), 0.0),
        (requirement(5, 4, 6, 3, 10), 0.5),
        (requirement(5, 4, 6, 7, 10), 0.5),
        (requirement(5, 4, 6, 1, 2), 1.0),
        (requirement(5, 5, 5, above=3), None),
    ],
)
def test_margin_counts_widths_to_the_bound_that_decides(found, expected):
    assert model.margin(found) == expected


values = st.one_of(st.floats(-1e9, 1e9, allow_subnormal=False), st.floats(1e-12, 1e12), st.sampled_from([0.0, 1.0, -1.0]))


@settings(deadline=None)
@given(*[st.lists(values, min_size=3, max_size=3).map(sorted)] * 2, values, st.booleans())
def test_a_plot_shows_on_which_side_of_the_bound_an_interval_lies(claim, control, bound, upper):
    sides = {"below" if upper else "above": bound}
    shown = [requirement(middle, low, high, **sides) for low, middle, high in (claim, control)]
    axis = plots.axis_for(shown)
    edge = axis.at(bound)
    for found in shown:
        low, middle, high = axis.at(found["low"]), axis.at(found["estimate"]), axis.at(found["high"])
        assert 0 <= low <= middle <= high <= 100
        ends = {"met": low <= edge and high <= edge if upper else low >= edge and high >= edge}
        ends["contradicted"] = low >= edge and high >= edge if upper else low <= edge and high <= edge
        assert ends.get(found["outcome"], low <= edge <= high)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 7
    assert [position for position, _ in ticks] == sorted({position for position, _ in ticks})
    assert len({label for _, label in ticks}) == len(ticks)
    plots.interval_plot("q", [("", {"claim": shown[0], "control": shown[1]})])


@pytest.mark.parametrize(
    ("sides", "shade", "flag"),
    [
        ({"below": 4}, (0.0, 50.0), "← at most 4"),
        ({"above": 4}, (50.0, 50.0), "at least 4 →"),
        ({"above": 2, "below": 4}, (4.0, 46.0), "2 to 4"),
    ],
)
def test_a_plot_draws_the_interval_and_shades_the_side_that_satisfies(sides, shade, flag):
    shown = {"claim": requirement(3, 2, 3.5, **sides), "control": requirement(6, 6, 6, **sides)}
    drawn = plots.interval_plot("q", [("", shown)])
    rectangle = re.search(r'class="satisfied" x="([\d.]+)%" width="([\d.]+)%"', drawn)
    assert tuple(map(float, rectangle.groups())) == shade
    assert 'cx="27.0%"' in drawn
    assert '<line x1="4.0%" x2="38.5%"' in drawn
    assert '<svg x="96.0%" y="50%" class="mark"><path' in drawn
    assert flag in drawn
    edges = {shade[0], shade[0] + shade[1]} - {0.0, 100.0}
    assert {float(x) for x in re.findall(r'class="bound" x1="([\d.]+)%"', drawn)} == edges


def test_the_bound_is_labelled_inside_the_plot():
    for value, anchor in ((10, "start"), (90, "end")):
        for side in ("below", "above"):
            ends = [requirement(0, 0, 0, **{side: value}), requirement(100, 100, 100, **{side: value})]
            drawn = plots.interval_plot("q", [("", dict(zip(("claim", "control"), ends, strict=True)))])
            assert f'y="13" text-anchor="{anchor}"' in drawn


def test_a_plot_says_what_the_control_has_to_do():
    shown = {"claim": requirement(1, 1, 1, below=2), "control": requirement(3, 3, 3, below=2)}
    assert "contradicted, as it must be" in plots.interval_plot("q", [("", shown)], must_break=True)
    assert "contradicted, need not break" in plots.interval_plot("q", [("", shown)], must_break=False)
    shown["control"] = shown["claim"]
    assert "met, should not be" in plots.interval_plot("q", [("", shown)], must_break=True)


def test_margin_of_a_setting_looks_at_what_decides_it():
    def arm(*requirements):
        named = [found | {"quantity": name} for name, found in zip("ab", requirements, strict=False)]
        return {"requirements": named, "control_breaks": ["a"]}

    wide, near, broken = requirement(5, 4, 6, above=2), requirement(5, 4, 6, above=3.8), requirement(5, 4, 6, above=9)
    claim = model.Setting("", "reproduced", "", {"claim": arm(wide, near), "control": arm(broken, near)})
    assert claim.margin == pytest.approx(0.1)
    claim = model.Setting("", "reproduced", "", {"claim": arm(wide, wide), "control": arm(requirement(5, 4, 6, above=6.4), near)})
    assert claim.margin == pytest.approx(0.2)
    claim = model.Setting("", "not reproduced", "", {"claim": arm(broken, near), "control": arm(broken, near)})
    assert claim.margin == pytest.approx(1.5)
    assert model.Setting("", "inconclusive", "", {"claim": arm(near), "control": arm(broken)}).margin is None


def test_the_axis_is_logarithmic_where_a_linear_one_would_hide_the_small():
    assert plots.axis_for([requirement(1, 0.9, 1.1, below=900)]).kind == "linear"
    assert plots.axis_for([requirement(1, 0.9, 1.1, below=2000)]).kind == "log"
    assert plots.axis_for([requirement(0, 0, 0, below=1e-9), requirement(0.3, 0.3, 0.3, below=1e-9)]).kind == "symlog"
    assert plots.axis_for([requirement(0.1, -0.1, 0.3, above=0), requirement(1e-9, -0.2, 0.2, above=0)]).kind == "linear"
    nothing = requirement(0, -2e-16, 2e-16, below=-0.7)
    assert plots.axis_for([requirement(-0.2, -0.4, 0.02, below=-0.7), nothing]).kind == "linear"
    assert plots.axis_for([requirement(1e-16, 1e-16, 1e-16, below=0.5), requirement(0.9, 0.9, 0.9, below=0.5)]).kind == "linear"
    near = plots.Axis("linear", 1e5, 1e5 + 0.004).ticks()
    assert near[1][1] == "100,000.002"
    assert plots.Axis("log", 0, 4).ticks() == [(4.0, "1"), (27.0, "10"), (50.0, "100"), (73.0, "10³"), (96.0, "10⁴")]


def test_curves_share_a_plot_and_what_both_arms_drew_alike_appears_once():
    def curve(series, y):
        about = {"name": "loss", "series": series, "x_label": "step", "y_label": "", "log": "x"}
        return about | {"x": [1.0, 2.0], "y": y, "low": None, "high": None}

    arms = {"claim": {"curves": [curve("ours", [2.0, 1.0]), curve("base", [3.0, 3.0])]}}
    arms["control"] = {"curves": [curve("ours", [3.0, 2.0]), curve("base", [3.0, 3.0])]}
    (plot,) = plots.curve_plots([("", arms)])
    assert [(series["name"], series["arm"]) for series in plot["series"]] == [
        ("ours", "claim"),
        ("base", "claim"),
        ("ours", "control"),
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (24_000, "24,000"),
        (-3, "−3"),
        (0.123456, "0.1235"),
        (1234.6, "1,235"),
        (123456.789, "123,457"),
        (2.5e-4, "2.5×10⁻⁴"),
        (1e-9, "10⁻⁹"),
        (-1e-9, "−10⁻⁹"),
        (1.5e15, "1.5×10¹⁵"),
        (0.1 + 0.2, "0.3"),
        (math.inf, "∞"),
    ],
)
def test_numbers_are_short(value, shown):
    assert text.number(value) == shown


def test_an_interval_has_the_digits_that_its_width_justifies():
    assert text.interval(0.123456, 0.101, 0.145) == ("0.123", "[0.101, 0.145]")
    assert text.interval(71.44, 68.1, 74.9) == ("71.4", "[68.1, 74.9]")
    assert text.interval(0.2, -0.53, 0.98, 1.0) == ("0.20", "[−0.53, 0.98]")
    assert text.interval(0.05, 0.04, 0.06) == ("0.050", "[0.040, 0.060]")
    assert text.interval(3.0, 3.0, 3.0) == ("3", "")
    assert text.interval(1.0, 1 - 1e-12, 1 + 1e-12) == ("1", "± 10⁻¹²")
    assert text.interval(2e-5, 1e-5, 3e-5) == ("2×10⁻⁵", "[10⁻⁵, 3×10⁻⁵]")


def test_requirements_in_words():
    assert text.bounds(0.5, None, "%") == "at least 0.5 %"
    assert text.bounds(None, 100_000.5) == "at most 100,000.5"
    assert text.bounds(1, 2) == "1 to 2"
    assert text.bounds(4, 4, "bits") == "exactly 4 bits"
