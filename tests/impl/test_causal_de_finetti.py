"""Causal de Finetti against integrals, plain loops and scipy's tests."""

from itertools import product
from math import log

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2, chi2_contingency

from paperclaims.impl.uncertainty.causal_de_finetti import (
    NO_EDGE,
    X_TO_Y,
    Y_TO_X,
    beta_bernoulli_joint,
    bivariate_graph,
    bivariate_p_values,
    conditional_mutual_information,
    contingency_table,
    independence_test,
    mixture_joint,
    recover_graph,
    recover_graphs,
)

CAUSE = torch.tensor([1.3, 2.1], dtype=torch.float64)
EFFECT = torch.tensor([[1.5, 3.2], [2.2, 1.1]], dtype=torch.float64)
FAIR = torch.full((2, 2), 0.25)


def by_integration(samples):
    def integral(a, b):
        return quad(lambda t: t ** (a - 1) * (1 - t) ** (b - 1), 0, 1, epsabs=1e-13)[0]

    def moment(a, b, ones, zeros):
        return integral(a + ones, b + zeros) / integral(a, b)

    joint = np.empty((2,) * (2 * samples))
    for state in product((0, 1), repeat=2 * samples):
        x, y = np.array(state[0::2]), np.array(state[1::2])
        groups = [(CAUSE, x), (EFFECT[0], y[x == 0]), (EFFECT[1], y[x == 1])]
        joint[state] = np.prod([moment(*prior.tolist(), outcome.sum(), (1 - outcome).sum()) for prior, outcome in groups])
    return torch.from_numpy(joint)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_beta_bernoulli_joint_is_the_integral(samples):
    joint = beta_bernoulli_joint(CAUSE, EFFECT, samples)
    torch.testing.assert_close(joint, by_integration(samples), rtol=1e-9, atol=1e-11)


def test_beta_bernoulli_joint_is_batched_and_differentiable():
    cause, effect = torch.rand(3, 4, 2, dtype=torch.float64) + 0.5, torch.rand(3, 4, 2, 2, dtype=torch.float64) + 0.5
    joint = beta_bernoulli_joint(cause, effect)
    assert joint.shape == (3, 4, 2, 2, 2, 2)
    torch.testing.assert_close(joint.flatten(2).sum(-1), torch.ones(3, 4, dtype=torch.float64))
    torch.testing.assert_close(joint[2, 1], beta_bernoulli_joint(cause[2, 1], effect[2, 1]))
    assert beta_bernoulli_joint(cause.float(), effect.float()).dtype == torch.float32
    torch.autograd.gradcheck(beta_bernoulli_joint, (CAUSE.clone().requires_grad_(), EFFECT.clone().requires_grad_()))


def test_mixture_joint_against_loops():
    generator = np.random.default_rng(3)
    theta, psi, weights = generator.random(4), generator.random((4, 2)), generator.dirichlet(np.ones(4))
    expected = np.zeros((2,) * 6)
    for state, k in product(product((0, 1), repeat=6), range(4)):
        chance = weights[k]
        for x, y in zip(state[0::2], state[1::2], strict=True):
            chance *= theta[k] if x else 1 - theta[k]
            chance *= psi[k, x] if y else 1 - psi[k, x]
        expected[state] += chance
    joint = mixture_joint(*map(torch.from_numpy, (theta, psi, weights)), samples=3)
    torch.testing.assert_close(joint, torch.from_numpy(expected))
    inputs = [torch.from_numpy(a).requires_grad_() for a in (theta, psi)]
    torch.autograd.gradcheck(lambda t, p: mixture_joint(t, p, torch.from_numpy(weights)), inputs)


def test_a_product_of_mechanisms_is_an_icm_process():
    theta, psi = torch.tensor([0.1, 0.7, 0.9]).double(), torch.tensor([[0.2, 0.6], [0.8, 0.3]]).double()
    joint = mixture_joint(theta.repeat(2), psi.repeat_interleave(3, 0), torch.full((6,), 1 / 6, dtype=torch.float64))
    assert conditional_mutual_information(joint, (1,), (2,), (0,), variables=4).abs() < 1e-15
    assert conditional_mutual_information(joint, (0,), (3,), (1,), variables=4) > 1e-4


def test_mixture_of_certainties():
    joint = mixture_joint(torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0.25, 0.75]))
    assert joint[0, 1, 0, 1] == 0.25
    assert joint[1, 0, 1, 0] == 0.75
    assert conditional_mutual_information(joint, (0,), (2,), variables=4) > 0.5


def test_conditional_mutual_information_against_loops():
    joint = torch.rand(5, 2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    joint /= joint.flatten(1).sum(-1).reshape(-1, 1, 1, 1, 1)
    found = conditional_mutual_information(joint, (3, 0), (1,), (2,), variables=4)
    for p, value in zip(joint.numpy(), found, strict=True):
        expected = 0.0
        for a, b, c, d in np.ndindex(p.shape):
            expected += p[a, b, c, d] * log(p[a, b, c, d] * p[:, :, c].sum() / p[a, :, c, d].sum() / p[:, b, c].sum())
        assert float(value) == pytest.approx(expected, abs=1e-14)
    unconditional = conditional_mutual_information(joint, (0,), (1,), variables=4)
    pair = joint.sum((3, 4))
    expected = (pair * (pair / pair.sum(1, keepdim=True) / pair.sum(2, keepdim=True)).log()).sum((1, 2))
    torch.testing.assert_close(unconditional, expected)


def test_conditional_mutual_information_of_rare_outcomes():
    joint = torch.tensor([[1e-200, 1e-190], [1e-180, 1.0]], dtype=torch.float64)
    assert abs(conditional_mutual_information(joint, (0,), (1,), variables=2)) < 1e-150
    assert abs(conditional_mutual_information(1.0005 * FAIR, (0,), (1,), variables=2)) < 1e-3  # a sum may be off a little


def test_contingency_table_counts():
    values = np.random.default_rng(0).integers(0, 3, (4, 50, 3))
    expected = np.zeros((4, 3, 3, 3))
    for g, e in product(range(4), range(50)):
        expected[(g, *values[g, e])] += 1
    torch.testing.assert_close(contingency_table(torch.from_numpy(values), 3), torch.from_numpy(expected))
    assert contingency_table(torch.zeros(0, 2, dtype=torch.long)).sum() == 0
    zeros = contingency_table(torch.zeros(4, 5, 2, dtype=torch.long))  # no table has an entry in its last cells
    assert zeros.tolist() == [[[5, 0], [0, 0]]] * 4
    assert contingency_table(torch.ones(3, 9, dtype=torch.int8)).flatten()[-1] == 3  # 512 cells, numbered beyond int8


@pytest.mark.parametrize(("statistic", "power"), [("g", "log-likelihood"), ("chi2", "pearson")])
def test_independence_test_against_scipy(statistic, power):
    table = np.random.default_rng(1).integers(1, 30, (6, 2, 3, 4)).astype(float)
    values, p_values = independence_test(torch.from_numpy(table), statistic)
    for counts, value, p_value in zip(table, values, p_values, strict=True):
        strata = [chi2_contingency(counts[..., c], correction=False, lambda_=power) for c in range(4)]
        expected = sum(stratum.statistic for stratum in strata)
        assert float(value) == pytest.approx(expected, rel=1e-10)
        assert float(p_value) == pytest.approx(chi2.sf(expected, sum(stratum.dof for stratum in strata)), rel=1e-9)


@pytest.mark.parametrize("statistic", ["g", "chi2"])
def test_independence_test_counts_what_occurs(statistic):
    full = torch.tensor([[8.0, 3.0], [2.0, 9.0]])
    alone = independence_test(full[..., None], statistic)
    empty_stratum = independence_test(torch.stack([full, torch.zeros(2, 2)], -1), statistic)
    constant_stratum = independence_test(torch.stack([full, torch.tensor([[4.0, 5.0], [0.0, 0.0]])], -1), statistic)
    empty_row = independence_test(torch.cat([full, torch.zeros(1, 2)])[..., None], statistic)
    for same in (empty_stratum, constant_stratum, empty_row):
        torch.testing.assert_close(same, alone)
    assert independence_test(torch.zeros(2, 2, 1), statistic)[1] == 1
    assert independence_test(torch.tensor([[5.0, 7.0], [0.0, 0.0]])[..., None], statistic)[1] == 1


def test_bivariate_p_values_are_the_three_tests():
    samples = np.random.default_rng(2).integers(0, 2, (2, 400, 2, 2))
    samples[..., 1] |= samples[..., 0] & (np.random.default_rng(3).random((2, 400, 2)) < 0.3)
    found = bivariate_p_values(torch.from_numpy(samples))
    for g in range(2):
        x, y = samples[g, :, :, 0].T, samples[g, :, :, 1].T  # x[n] is the n-th sample
        for p_value, (a, b, c) in zip(found, [(y[0], x[1], x[0]), (x[0], y[1], y[0]), (x[0], y[0], 0 * y[0])], strict=True):
            strata = [np.histogram2d(a[c == v], b[c == v], 2)[0] for v in np.unique(c)]
            tests = [chi2_contingency(stratum, correction=False, lambda_="log-likelihood") for stratum in strata]
            expected = chi2.sf(sum(test.statistic for test in tests), len(tests))
            assert float(p_value[g]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("p_values", "graph"),
    [
        ((0.5, 0.01, 0.01), X_TO_Y),
        ((0.01, 0.5, 0.01), Y_TO_X),
        ((0.2, 0.3, 0.06), NO_EDGE),
        ((0.06, 0.2, 0.01), Y_TO_X),  # no pattern fits from here on: the largest decides
        ((0.3, 0.2, 0.01), X_TO_Y),
        ((0.01, 0.02, 0.04), NO_EDGE),
        ((0.04, 0.02, 0.01), X_TO_Y),
        ((0.06, 0.01, 0.5), NO_EDGE),
        ((0.05, 0.01, 0.01), X_TO_Y),
        ((0.0, 1.0, 0.0), Y_TO_X),
    ],
)
def test_bivariate_graph_decides_by_the_pattern(p_values, graph):
    assert bivariate_graph(*torch.tensor(p_values, dtype=torch.float64)) == graph


def exclusive_or(edges, variables, environments, seed):
    """Children are the noise XOR each parent; rates differ much between environments, so that few of them suffice."""
    generator = np.random.default_rng(seed)
    theta = generator.beta(0.3, 0.9, (environments, 1, variables))
    values = (generator.random((environments, 2, variables)) < theta).astype(np.int64)
    for j, k in edges:  # in topological order of the children
        values[..., k] ^= values[..., j]
    return torch.from_numpy(values)


@pytest.mark.parametrize("edges", [set(), {(0, 1)}, {(1, 0)}, {(2, 0), (2, 1)}, {(0, 2), (1, 2)}, {(0, 1), (1, 2)}])
@pytest.mark.parametrize("force_sink", [True, False])
def test_recover_graphs_on_data_of_each_kind(edges, force_sink):
    samples = torch.stack([exclusive_or(sorted(edges, key=lambda e: e[1]), 3, 4000, seed) for seed in (1, 2, 3)])
    found = recover_graphs(samples, alpha=1e-3, force_sink=force_sink)
    expected = torch.zeros(3, 3, dtype=torch.bool)
    for j, k in edges:
        expected[j, k] = True
    torch.testing.assert_close(found, expected.expand(3, 3, 3))


def test_recover_graph_conditions_on_mediators_and_shared_children():
    """0 -> 2 <- 1, 2 -> 3 <- 1: 0 and 3 are independent only given 2 (mediator) and 1 (shares the child 2)."""
    asked = []

    def across(i, k, others):
        parents = {0: set(), 1: set(), 2: {0, 1}, 3: {1, 2}}
        children = {k for k, of in parents.items() if i in of}
        return 0.0 if children & (others | {k}) else 1.0

    def within(j, k, given):
        asked.append((j, k, given))
        return 0.0 if (j, k) in {(0, 2), (1, 2), (1, 3), (2, 3)} else 1.0

    assert recover_graph(across, within, 4) == {(0, 2), (1, 2), (1, 3), (2, 3)}
    assert (0, 3, frozenset({1, 2})) in asked
    assert (2, 3, frozenset({0, 1})) in asked
    assert (0, 2, frozenset()) in asked


def test_recover_graph_conditions_on_those_that_share_a_child_only():
    """0 -> 3 <- 2, 1 -> 4, 3 -> 5 <- 4: between 0 and 5 stand 3 and 4, and 2 shares the child 3 with 0; 1 does not."""
    parents, asked = {0: set(), 1: set(), 2: set(), 3: {0, 2}, 4: {1}, 5: {3, 4}}, []

    def across(i, k, others):
        return 0.0 if {child for child, of in parents.items() if i in of} & (others | {k}) else 1.0

    def within(j, k, given):
        asked.append((j, k, set(given)))
        return 0.0 if j in parents[k] else 1.0

    assert recover_graph(across, within, 6) == {(j, k) for k, of in parents.items() for j in of}
    assert asked[:2] == [(3, 5, {0, 1, 2}), (4, 5, {0, 1, 2})]
    assert asked[2:8] == [(j, k, set()) for j in (0, 1, 2) for k in (3, 4)]
    assert asked[8:] == [(0, 5, {2, 3, 4}), (1, 5, {3, 4}), (2, 5, {0, 3, 4})]


def test_recover_graphs_tests_at_the_paper_s_level_unless_told():
    samples = torch.from_numpy(np.random.default_rng(5).integers(0, 2, (40, 60, 2, 2)))
    assert torch.equal(recover_graphs(samples), recover_graphs(samples, alpha=0.05))
    assert not torch.equal(recover_graphs(samples), recover_graphs(samples, alpha=0.1))


def test_recover_graph_without_a_sink():
    def across(i, k, others):
        return (0.01, 0.04, 0.02)[i] if len(others) == 2 else 1.0

    assert recover_graph(across, lambda j, k, given: 0.0, 3) == set()
    assert recover_graph(across, lambda j, k, given: 0.0, 3, force_sink=True) == {(0, 1), (2, 1)}
    assert recover_graph(across, lambda j, k, given: 0.05, 3, force_sink=True) == set()
    assert recover_graph(across, lambda j, k, given: 0.0, 3, alpha=0.04) == {(0, 1), (2, 1)}


@pytest.mark.parametrize(
    "call",
    [
        lambda: beta_bernoulli_joint(CAUSE, EFFECT, 0),
        lambda: beta_bernoulli_joint(CAUSE[:1], EFFECT),
        lambda: beta_bernoulli_joint(CAUSE, EFFECT[:1]),
        lambda: beta_bernoulli_joint(CAUSE * 0, EFFECT),
        lambda: beta_bernoulli_joint(CAUSE, EFFECT * torch.nan),
        lambda: beta_bernoulli_joint(CAUSE, EFFECT * torch.inf),
        lambda: mixture_joint(torch.tensor([0.5]), torch.tensor([[0.5, 0.5]]), torch.tensor([1.0]), 0),
        lambda: mixture_joint(torch.tensor([0.5]), torch.tensor([0.5, 0.5]), torch.tensor([1.0])),
        lambda: mixture_joint(torch.tensor([0.5, 0.5]), torch.full((2, 2), 0.5), torch.tensor([1.0])),
        lambda: mixture_joint(torch.tensor([0.5]), torch.tensor([[0.5, 1.5]]), torch.tensor([1.0])),
        lambda: mixture_joint(torch.tensor([-0.5]), torch.tensor([[0.5, 0.5]]), torch.tensor([1.0])),
        lambda: mixture_joint(torch.tensor([torch.nan]), torch.tensor([[0.5, 0.5]]), torch.tensor([1.0])),
        lambda: mixture_joint(torch.tensor([0.5]), torch.tensor([[0.5, 0.5]]), torch.tensor([0.9])),
        lambda: conditional_mutual_information(FAIR, (0,), (0,), variables=2),
        lambda: conditional_mutual_information(FAIR, (0,), (), variables=2),
        lambda: conditional_mutual_information(FAIR, (), (0,), variables=2),
        lambda: conditional_mutual_information(FAIR, (0,), (2,), variables=2),
        lambda: conditional_mutual_information(FAIR, (-1,), (0,), variables=2),
        lambda: conditional_mutual_information(FAIR, (0,), (1,), variables=3),
        lambda: conditional_mutual_information(torch.full((2, 2), torch.nan), (0,), (1,), variables=2),
        lambda: conditional_mutual_information(-torch.ones(2, 2), (0,), (1,), variables=2),
        lambda: conditional_mutual_information(torch.ones(2, 2), (0,), (1,), variables=2),
        lambda: conditional_mutual_information(1.0015 * FAIR, (0,), (1,), variables=2),
        lambda: conditional_mutual_information(torch.tensor([[0.5, 0.5], [-0.5, 0.5]]), (0,), (1,), variables=2),
        lambda: contingency_table(torch.zeros(3, 2)),
        lambda: contingency_table(torch.zeros(0, 2, dtype=torch.long), 0),
        lambda: contingency_table(torch.zeros(3, 2, dtype=torch.complex64)),
        lambda: contingency_table(torch.zeros(3, dtype=torch.long)),
        lambda: contingency_table(torch.zeros(3, 0, dtype=torch.long)),
        lambda: contingency_table(torch.full((3, 2), 2)),
        lambda: contingency_table(torch.full((3, 2), -1)),
        lambda: independence_test(torch.ones(2, 2)),
        lambda: independence_test(-torch.ones(2, 2, 1)),
        lambda: independence_test(torch.full((2, 2, 1), torch.inf)),
        lambda: independence_test(torch.tensor([[1.0, torch.inf], [2.0, 3.0]])[..., None]),
        lambda: independence_test(torch.tensor([[1.0, -1.0], [2.0, 3.0]])[..., None]),
        lambda: independence_test(torch.ones(2, 2, 1), "z"),
        lambda: bivariate_p_values(torch.zeros(5, 2, 3, dtype=torch.long)),
        lambda: bivariate_p_values(torch.zeros(5, 3, 2, dtype=torch.long)),
        lambda: bivariate_p_values(torch.full((5, 2, 2), 2)),
        lambda: bivariate_graph(*torch.rand(3), alpha=0.0),
        lambda: bivariate_graph(*torch.tensor([0.5, torch.nan, 0.5])),
        lambda: bivariate_graph(*torch.tensor([0.5, 1.5, 0.5])),
        lambda: bivariate_graph(*torch.tensor([0.5, 0.5, -0.5])),
        lambda: recover_graphs(torch.zeros(5, 2, 3, dtype=torch.long)),
        lambda: recover_graphs(torch.zeros(1, 5, 3, 3, dtype=torch.long)),
        lambda: recover_graphs(torch.full((1, 5, 2, 3), 2)),
        lambda: recover_graphs(torch.zeros(1, 5, 2, 3, dtype=torch.long), alpha=1.0),
        lambda: recover_graph(lambda i, k, others: 1.0, lambda j, k, given: 1.0, 2, alpha=0.0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="must"):
        call()
