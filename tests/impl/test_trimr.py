"""TrimR's rules against a plain reading of them, and its closed form against enumeration."""

import itertools

import pytest
import torch

from paperclaims.impl.reasoning.trimr import (
    OVERTHINKING,
    REPETITION,
    UNDERTHINKING,
    Trimmer,
    affirms,
    overthinking_stop,
    repeated_block,
    split_thoughts,
    stopping_law,
    trim,
)

WAIT = "Wait"


class Reader:
    """Reads the answer of a thought as its last `=x` token, and counts how often it is asked."""

    def __init__(self):
        self.asked = self.compared = 0

    def answer(self, thought):
        return next((token for token in reversed(thought) if token.startswith("=")), None)

    def has_answer(self, thought):
        self.asked += 1
        return self.answer(thought) is not None

    def equivalent(self, thought, earlier):
        self.compared += 1
        return self.answer(thought) == self.answer(earlier)


def watch(text, **rules):
    """Where the chain stops (tokens pushed) and why."""
    trimmer = Trimmer(Reader(), {WAIT}, **rules)
    for position, token in enumerate(text.split()):
        if rule := trimmer.push(token):
            return position, rule
    return None


def test_thoughts_open_at_reflection_tokens_and_short_ones_merge():
    chain = ["a", "b", "Wait", "c", "Wait", "d", "e", "f", "Wait"]
    assert split_thoughts(chain, {WAIT}) == [range(0, 2), range(2, 4), range(4, 8), range(8, 9)]
    assert split_thoughts(chain, {WAIT}, minimum=3) == [range(0, 4), range(4, 8), range(8, 9)]
    assert split_thoughts(chain, {WAIT}, minimum=4) == [range(0, 4), range(4, 8), range(8, 9)]
    assert split_thoughts(chain, {WAIT}, minimum=5) == [range(0, 8), range(8, 9)]
    assert split_thoughts([WAIT, "a"], {WAIT}) == [range(0, 2)]
    assert split_thoughts([], {WAIT}) == []
    assert split_thoughts(["a", WAIT, "b"], {WAIT}) == [range(0, 1), range(1, 3)]
    assert split_thoughts(["a", "b", "c", "Wait", "d", "Wait", "e"], {WAIT}, minimum=3) == [range(0, 3), range(3, 7)]


@pytest.mark.parametrize(
    ("text", "rules", "expected"),
    [
        ("a =1 Wait b =1 Wait c =1 Wait", {}, (5, OVERTHINKING)),
        ("a =1 Wait b =1 Wait c =1 Wait", {"agreeing": 1}, (2, OVERTHINKING)),
        ("a =1 Wait b =1 Wait c =1 Wait", {"agreeing": 3}, (8, OVERTHINKING)),
        ("a =1 Wait b =2 Wait c =2 Wait", {}, (8, OVERTHINKING)),
        ("a =1 Wait b =2 Wait c =1 Wait", {}, None),
        ("a =1 Wait b =1 Wait c =2 Wait d =2 Wait e =2 Wait", {"agreeing": 3}, (14, OVERTHINKING)),
        ("a =1 Wait b Wait c =1 Wait", {}, (7, OVERTHINKING)),
        ("a b Wait =1 Wait c =1 Wait", {}, (7, OVERTHINKING)),
        ("a =1 Wait =2 Wait b c =2 Wait", {"minimum": 3}, (8, OVERTHINKING)),
        ("a =1 Wait b =2 Wait", {"minimum": 2, "agreeing": 1}, (2, OVERTHINKING)),
        ("a =1 Wait b =2 Wait c =3 Wait", {"many": 2}, (5, UNDERTHINKING)),
        ("a =1 Wait b =2 Wait c =3 Wait", {"many": 3}, (8, UNDERTHINKING)),
        ("a =1 Wait b =1 Wait", {"many": 2}, (5, OVERTHINKING)),
        ("a =1 Wait b =1 Wait", {"many": 2, "agreeing": None}, (5, UNDERTHINKING)),
        ("a =1 Wait b =2 Wait c =3 Wait", {"share": 0.5, "budget": 10}, (5, UNDERTHINKING)),
        ("a =1 Wait b =2 Wait c =3 Wait", {"share": 0.5, "budget": 11}, (8, UNDERTHINKING)),
        ("a =1 Wait b =2 Wait c =3 Wait", {"share": 1.0, "budget": 5}, (5, UNDERTHINKING)),
        ("x a b a b a b", {"repeats": 3, "shortest": 2}, (6, REPETITION)),
        ("x a b a b a b", {"repeats": 2, "shortest": 2}, (4, REPETITION)),
        ("x a a a a a", {"repeats": 2, "shortest": 2}, (4, REPETITION)),
        ("x a b a b a b", {"repeats": 3, "shortest": 3}, None),
        ("x a b a b a b", {}, None),
    ],
)
def test_a_rule_stops_the_chain_where_it_should(text, rules, expected):
    assert watch(text, **rules) == expected


def test_the_verifier_is_asked_once_a_thought():
    trimmer = Trimmer(Reader(), {WAIT})
    for token in ["a", "=1", "Wait", "b", "=2", "Wait", "c", "Wait", "d", "=3", "Wait", "e"]:
        trimmer.push(token)
    assert (trimmer.verifier.asked, trimmer.verifier.compared, trimmer.thoughts, trimmer.run) == (4, 2, 4, 1)


def test_repeated_block_finds_the_shortest_copy():
    assert repeated_block("abcabcabc", 3) == 3
    assert repeated_block("xxabcabc", 2) == 3
    assert repeated_block("aaaa", 2) == 1
    assert repeated_block("aaaa", 2, shortest=2) == 2
    assert repeated_block("abcabc", 2, longest=2) == 0
    assert repeated_block("abcabc", 2, longest=5) == 3
    assert repeated_block("abcabd", 2) == repeated_block("", 2) == 0
    assert repeated_block("abab", 3) == 0


def replay(text):
    """A generator that writes a fixed text whatever it is asked, and `end` behind it."""
    words = text.split()
    return lambda chain: words[len(chain)] if len(chain) < len(words) else "end"


GENTLE = {OVERTHINKING: ["agreed."], UNDERTHINKING: ["best", "so", "far."], REPETITION: ["stop."]}


def shorten(following, *, grace=2, limit=20, **rules):
    trimmer = Trimmer(Reader(), {WAIT}, **rules)
    return trim(
        following, trimmer, concludes=lambda token: token == "end", gentle=GENTLE, force=["answer:"], grace=grace, limit=limit
    )


def test_a_stop_is_gentle_first_and_forced_when_the_model_does_not_conclude():
    chain = "a =1 Wait b =1 Wait c d e f"
    obedient = lambda tokens: "end" if "agreed." in tokens else replay(chain)(tokens)  # noqa: E731
    assert shorten(obedient) == (["a", "=1", "Wait", "b", "=1", "agreed.", "end"], OVERTHINKING, False)
    assert shorten(replay(chain)) == (["a", "=1", "Wait", "b", "=1", "agreed.", "c", "d", "answer:"], OVERTHINKING, True)
    assert shorten(replay(chain), grace=0) == (["a", "=1", "Wait", "b", "=1", "agreed.", "answer:"], OVERTHINKING, True)
    assert shorten(replay("a =1 Wait b =2 Wait c d"), many=2, grace=0).tokens == [
        "a",
        "=1",
        "Wait",
        "b",
        "=2",
        "best",
        "so",
        "far.",
        "answer:",
    ]
    assert shorten(replay("a b a b a b"), repeats=2, shortest=2, grace=0).tokens == ["a", "b", "a", "b", "stop.", "answer:"]


def test_a_trimmer_watches_one_chain():
    trimmer = Trimmer(Reader(), {WAIT})
    trimmer.push("a")
    with pytest.raises(ValueError, match="watches one chain"):
        trim(replay("a =1"), trimmer, concludes=lambda token: token == "end", gentle=GENTLE, force=[], grace=0, limit=9)


def test_a_chain_that_concludes_or_runs_out_is_left_alone():
    assert shorten(replay("a =1")) == (["a", "=1", "end"], None, False)
    assert shorten(replay("a b c d e f g"), limit=3) == (["a", "b", "c", "answer:"], None, True)


@pytest.mark.parametrize("agreeing", [1, 2, 3, 4])
def test_recorded_chains_stop_where_the_watcher_stops(agreeing):
    kinds = ["", "=1", "=2"]
    chains = list(itertools.product(kinds, repeat=5))
    answered = torch.tensor([[bool(answer) for answer in chain] for chain in chains])
    before = [[next((a for a in reversed(chain[:i]) if a), None) for i in range(5)] for chain in chains]
    equivalent = torch.tensor(
        [[a == b for a, b in zip(chain, earlier, strict=True)] for chain, earlier in zip(chains, before, strict=True)]
    )
    expected = []
    for chain in chains:
        trimmer = Trimmer(Reader(), {WAIT}, agreeing=agreeing)
        stops = [bool(trimmer.push(token)) for answer in chain for token in ("x", answer, WAIT)]
        expected.append(stops.index(True) // 3 if True in stops else 5)
    assert overthinking_stop(answered, equivalent, agreeing).tolist() == expected
    assert overthinking_stop(answered[None], equivalent[None], agreeing).tolist() == [expected]


def brute_force(start, transition, agreeing, false_positive, false_negative, lengths, horizon=50):
    """Law of the stop by walking every path of answers and verdicts: (thoughts, tokens, answers, mass that has stopped)."""
    m = len(start)
    alive = {(a, 1, float(lengths[a]), 1): float(start[a]) for a in range(m)}
    thoughts = tokens = stopped = 0.0
    answers = [0.0] * m
    for _ in range(horizon):
        following = {}
        for (a, run, cost, count), p in alive.items():
            if run == agreeing:
                thoughts, tokens, stopped = thoughts + p * count, tokens + p * cost, stopped + p
                answers[a] += p
                continue
            for b in range(m):
                yes = 1 - false_negative if a == b else false_positive
                for verdict, chance in ((True, yes), (False, 1 - yes)):
                    key = (b, run + 1 if verdict else 1, round(cost + float(lengths[b]), 9), count + 1)
                    following[key] = following.get(key, 0.0) + p * float(transition[a, b]) * chance
        alive = following
    return thoughts, tokens, answers, stopped


@pytest.mark.parametrize("agreeing", [1, 2, 3, 4])
def test_the_closed_form_equals_the_sum_over_all_paths(agreeing):
    start = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    transition = torch.tensor([[0.95, 0.03, 0.02], [0.05, 0.9, 0.05], [0.1, 0.04, 0.86]], dtype=torch.float64)
    lengths = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    rates = {"false_positive": 0.3, "false_negative": 0.02}
    law = stopping_law(start, transition, agreeing, lengths=lengths, **rates)
    thoughts, tokens, answers, stopped = brute_force(start, transition, agreeing, *rates.values(), lengths)
    assert stopped > 1 - 1e-6
    torch.testing.assert_close(law.thoughts.item(), thoughts, rtol=0, atol=2e-5)
    torch.testing.assert_close(law.tokens.item(), tokens, rtol=0, atol=6e-5)
    torch.testing.assert_close(law.answer, torch.tensor(answers, dtype=torch.float64), rtol=0, atol=2e-6)


def test_the_closed_form_knows_independent_answers():
    half = torch.full((2,), 0.5, dtype=torch.float64)
    law = stopping_law(half, half.expand(2, 2), 2, lengths=torch.tensor([4.0, 4.0], dtype=torch.float64))
    assert law.thoughts.item() == pytest.approx(3.0)
    assert law.tokens.item() == pytest.approx(12.0)
    always = stopping_law(half, half.expand(2, 2), 4, false_positive=1.0, lengths=half)
    never_same = stopping_law(half, half.expand(2, 2), 2, false_positive=1.0, false_negative=1.0, lengths=half)
    assert (always.thoughts.item(), never_same.thoughts.item()) == (pytest.approx(4.0), pytest.approx(3.0))
    three = stopping_law(half, half.expand(2, 2), 3, lengths=half)
    assert three.thoughts.item() == pytest.approx(7.0)


def test_the_closed_form_has_gradients():
    def law(logits, moves, lengths):
        return stopping_law(logits.softmax(0), moves.softmax(1), 3, false_positive=0.1, false_negative=0.2, lengths=lengths)

    torch.manual_seed(0)
    inputs = [torch.randn(3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(law, [x.requires_grad_() for x in inputs])


def test_the_decision_is_the_larger_of_yes_and_no():
    assert affirms(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, -1.0, 0.0])).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="NaN"):
        affirms(torch.tensor([torch.nan, 1.0]), torch.zeros(2))
    with pytest.raises(ValueError, match="NaN"):
        affirms(torch.zeros(2), torch.tensor([torch.nan, 1.0]))
    with pytest.raises(ValueError, match="shape"):
        affirms(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize(
    "rules",
    [
        {"agreeing": 0},
        {"many": 0},
        {"minimum": 0},
        {"shortest": 0},
        {"repeats": 1},
        {"share": 0.5},
        {"budget": 10},
        {"share": 0.0, "budget": 10},
        {"share": 1.1, "budget": 10},
        {"share": 0.5, "budget": 0},
    ],
)
def test_rules_that_make_no_sense_are_refused(rules):
    with pytest.raises(ValueError, match=r"at least|come together"):
        Trimmer(Reader(), {WAIT}, **rules)


def test_bad_input_is_refused():
    good, same = torch.tensor([0.5, 0.5]), torch.eye(2)
    cases = [
        lambda: split_thoughts([], {WAIT}, minimum=0),
        lambda: repeated_block("aa", 1),
        lambda: repeated_block("aa", 2, shortest=0),
        lambda: overthinking_stop(torch.zeros(2, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)),
        lambda: overthinking_stop(torch.zeros(2), torch.zeros(2, dtype=torch.bool)),
        lambda: overthinking_stop(torch.zeros(2, dtype=torch.bool), torch.zeros(2)),
        lambda: overthinking_stop(torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool), 0),
        lambda: stopping_law(good, same, 0, lengths=good),
        lambda: stopping_law(good, torch.eye(3), 2, lengths=good),
        lambda: stopping_law(good, same, 2, lengths=torch.ones(3)),
        lambda: stopping_law(good[None], same, 2, lengths=good),
        lambda: stopping_law(torch.ones(1, 1), torch.ones(1, 1), 2, lengths=torch.ones(1)),
        lambda: stopping_law(torch.tensor([0.5, 0.4]), same, 2, lengths=good),
        lambda: stopping_law(torch.tensor([1.5, -0.5]), same, 2, lengths=good),
        lambda: stopping_law(torch.tensor([torch.nan, 0.5]), same, 2, lengths=good),
        lambda: stopping_law(good, same * 0.9, 2, lengths=good),
        lambda: stopping_law(good, same, 2, lengths=good, false_positive=1.1),
        lambda: stopping_law(good, same, 2, lengths=good, false_negative=-0.1),
        lambda: stopping_law(good, same.flip(0), 2, lengths=good),
        lambda: shorten(replay("a"), grace=-1),
        lambda: shorten(replay("a"), limit=0),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"\w"):
            case()
    with pytest.raises(ValueError, match="gentle phrase"):
        trim(replay("a"), Trimmer(Reader(), {WAIT}), concludes=bool, gentle={}, force=[], grace=0, limit=1)
