"""Causal de Finetti: causal structure from exchangeable data (Guo, Tóth, Schölkopf and Huszár, NeurIPS 2023, arXiv 2203.15756).

Environments differ, and inside one the samples are exchangeable. When the mechanisms (`theta` of the cause, `psi` of the effect)
are drawn independently of each other, the pairs (X_n, Y_n) satisfy, for X -> Y,

    Y_[n] independent of X_{n+1} given X_[n]        (causal de Finetti, bivariate)

and in general not the mirror image, so that two samples from each of many environments show the direction of an edge.
Exact joints by enumeration, independence tests on contingency tables, and the bivariate and the multivariate algorithm.
"""

from collections.abc import Callable
from functools import cache, reduce
from itertools import product
from math import prod

import torch
from torch import Tensor

X_TO_Y, Y_TO_X, NO_EDGE = 0, 1, 2

PValue = Callable[[int, int, frozenset[int]], float]


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def beta_bernoulli_joint(cause: Tensor, effect: Tensor, samples: int = 2) -> Tensor:
    """Joint law of `samples` binary pairs from one environment of the ICM process X -> Y with Beta priors, in closed form.

    theta ~ Beta(cause) and psi_x ~ Beta(effect[x]) are independent; X_n ~ Bernoulli(theta), Y_n ~ Bernoulli(psi_{X_n}).

    Args:
        cause: (alpha, beta) of theta, shape (..., 2), positive.
        effect: (alpha, beta) of psi_0 and psi_1, shape (..., 2, 2), positive.
        samples: number N of pairs, at least 1.

    Returns:
        P(x_1, y_1, ..., x_N, y_N), shape (..., 2, 2, ..., 2) with 2 N axes of length 2; differentiable.

    Raises:
        ValueError: wrong shapes, N < 1, or a hyper-parameter that is not positive and finite.

    Source: the bivariate causal de Finetti theorem, with mu and nu Beta laws: every integral is a ratio of Beta functions.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if cause.shape[-1:] != (2,) or effect.shape != (*cause.shape[:-1], 2, 2):
        raise ValueError(f"cause must be (..., 2) and effect (..., 2, 2), got {tuple(cause.shape)} and {tuple(effect.shape)}")
    priors = torch.cat([cause.unsqueeze(-2), effect], dim=-2)
    if not bool((priors > 0).all() & priors.isfinite().all()):
        raise ValueError("Beta hyper-parameters must be positive and finite")
    states = torch.tensor(list(product((0, 1), repeat=2 * samples)), device=cause.device)
    x, y = states[:, 0::2], states[:, 1::2]
    groups = [(x, torch.ones_like(x)), (y, 1 - x), (y, x)]  # outcomes of theta, psi_0 and psi_1, and which trials are theirs
    ones = torch.stack([(outcome * trials).sum(1) for outcome, trials in groups], -1).to(priors)
    totals = torch.stack([trials.sum(1) for _, trials in groups], -1).to(priors)
    a, b = priors.unsqueeze(-3).unbind(-1)
    log_joint = (_log_beta(a + ones, b + totals - ones) - _log_beta(a, b)).sum(-1)
    return log_joint.exp().unflatten(-1, (2,) * (2 * samples))


def mixture_joint(theta: Tensor, psi: Tensor, weights: Tensor, samples: int = 2) -> Tensor:
    """Joint law of `samples` binary pairs when environments are a finite mixture with any dependence between the mechanisms.

    One component is the i.i.d. case; components that pair theta with psi break the independence of the mechanisms.

    Args:
        theta: P(X = 1) in each component, shape (..., K).
        psi: P(Y = 1 | X = x) in each component, shape (..., K, 2).
        weights: probabilities of the components, shape (..., K), summing to 1.
        samples: number N of pairs, at least 1.

    Returns:
        P(x_1, y_1, ..., x_N, y_N), shape (..., 2, ..., 2) with 2 N axes of length 2; differentiable.

    Raises:
        ValueError: wrong shapes, N < 1, probabilities outside [0, 1] (or NaN), weights that do not sum to 1.

    Source: de Finetti's representation, with a discrete mixing measure over (theta, psi).
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if psi.shape != (*theta.shape, 2) or weights.shape != theta.shape:
        raise ValueError(f"theta and weights must be (..., K), psi (..., K, 2), got {tuple(theta.shape)} and {tuple(psi.shape)}")
    for name, value in (("theta", theta), ("psi", psi), ("weights", weights)):
        if not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"{name} must lie in [0, 1]")
    if not torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0])):
        raise ValueError("weights must sum to 1")
    p_x = torch.stack([1 - theta, theta], -1)
    p_y = torch.stack([1 - psi, psi], -1)
    pair = (p_x.unsqueeze(-1) * p_y).flatten(-2)  # (..., K, 4): one sample's law in each component
    law = reduce(lambda left, right: (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2), [pair] * samples)
    return (weights.unsqueeze(-1) * law).sum(-2).unflatten(-1, (2,) * (2 * samples))


def conditional_mutual_information(
    joint: Tensor, left: tuple[int, ...], right: tuple[int, ...], given: tuple[int, ...] = (), *, variables: int
) -> Tensor:
    """I(left; right | given) in nats, by enumeration.

    Args:
        joint: probabilities, shape (..., L_0, ..., L_{V-1}); the leading axes are independent joints.
        left, right, given: disjoint sets of variables, numbered from 0 to V - 1; `given` may be empty.
        variables: number V of trailing axes that are variables.

    Returns:
        Shape of the leading axes; zero up to rounding (of either sign, some 1e-16) where the independence holds.

    Raises:
        ValueError: sets that overlap, an empty side, a variable out of range, or values that are no probabilities: negative,
            not finite, or a sum off 1 by more than 0.001 (counts, say).
    """
    named = (*left, *right, *given)
    if len(set(named)) != len(named) or not left or not right:
        raise ValueError("left, right and given must be disjoint, left and right not empty")
    if not 0 < variables <= joint.ndim or min(named) < 0 or max(named) >= variables:
        raise ValueError(f"variables must be among the {variables} trailing axes of {tuple(joint.shape)}, got {named}")
    if not bool((joint >= 0).all() & joint.isfinite().all()):
        raise ValueError("probabilities must be finite and not negative")
    total = joint.sum(list(range(-variables, 0)))
    if not torch.allclose(total, torch.ones_like(total), atol=1e-3):
        raise ValueError("probabilities must sum to 1")

    def marginal(kept: tuple[int, ...]) -> Tensor:
        dropped = [axis - variables for axis in range(variables) if axis not in kept]
        return joint.sum(dropped, keepdim=True) if dropped else joint

    p, p_left, p_right, p_given = marginal(named), marginal((*left, *given)), marginal((*right, *given)), marginal(given)
    terms = torch.xlogy(p, p) + torch.xlogy(p, p_given) - torch.xlogy(p, p_left) - torch.xlogy(p, p_right)
    return terms.sum(list(range(-variables, 0)))


def contingency_table(values: Tensor, levels: int = 2) -> Tensor:
    """Counts of every joint outcome.

    Args:
        values: integers in [0, levels), shape (..., E, V): E observations of V variables.
        levels: number of values that each variable can take.

    Returns:
        float64 counts, shape (..., levels, ..., levels) with V axes of length `levels`.

    Raises:
        ValueError: values that are not integers or out of range, no variables, no levels.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    if values.is_floating_point() or values.is_complex() or values.ndim < 2 or values.shape[-1] == 0:
        raise ValueError(f"values must be integers of shape (..., E, V), got {values.dtype} {tuple(values.shape)}")
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < levels:
        raise ValueError(f"values must lie in [0, {levels})")
    *batch, observations, variables = values.shape
    codes = values.new_zeros(values.shape[:-1], dtype=torch.long)
    for variable in values.unbind(-1):
        codes = codes * levels + variable
    tables, cells = prod(batch), levels**variables
    offset = torch.arange(tables, device=values.device).unsqueeze(-1) * cells
    counts = torch.bincount((codes.reshape(tables, observations) + offset).flatten(), minlength=tables * cells)
    return counts.double().reshape(*batch, *(levels,) * variables)


def independence_test(table: Tensor, statistic: str = "g") -> tuple[Tensor, Tensor]:
    """Test of A independent of B given C on many contingency tables at once.

    Args:
        table: counts, shape (..., A, B, C); C = 1 for an unconditional test.
        statistic: "g" (likelihood ratio) or "chi2" (Pearson).

    Returns:
        (statistic, p-value), each of shape (...), float64. The degrees of freedom of a stratum are (rows - 1)(columns - 1),
        counting the rows and columns that occur in it; without any, the p-value is 1.

    Raises:
        ValueError: fewer than three axes, negative or non-finite counts, an unknown statistic.

    Source: the test that the paper's experiments use on binary data.
    """
    if table.ndim < 3 or not bool((table >= 0).all() & table.isfinite().all()):
        raise ValueError("table must hold finite counts of shape (..., A, B, C)")
    table = table.double()
    rows, columns, strata = table.sum(-2, keepdim=True), table.sum(-3, keepdim=True), table.sum((-3, -2), keepdim=True)
    expected = rows * columns / strata.clamp(min=1)
    if statistic == "g":
        terms = 2 * (torch.xlogy(table, table) - torch.xlogy(table, expected))
    elif statistic == "chi2":
        terms = torch.where(expected > 0, (table - expected) ** 2 / expected, 0.0)
    else:
        raise ValueError(f"statistic must be 'g' or 'chi2', got {statistic!r}")
    value = terms.sum((-3, -2, -1)).clamp(min=0)
    freedom = (((rows > 0).sum(-3) - 1) * ((columns > 0).sum(-2) - 1)).flatten(-2)  # empty strata: (-1)(-1), dropped below
    freedom = (freedom * (strata.flatten(-3) > 0)).sum(-1).double()
    p_value = torch.special.gammaincc(freedom.clamp(min=1) / 2, value / 2)
    return value, torch.where(freedom > 0, p_value, torch.ones_like(p_value))


def _p_value(table: Tensor, variables: int, left: int, right: int, given: tuple[int, ...]) -> Tensor:
    """p-values of left independent of right given the rest named; axes count from the first of `variables` trailing axes."""
    batch = table.ndim - variables
    kept = (left, right, *given)
    dropped = [batch + axis for axis in range(variables) if axis not in kept]
    marginal = table.sum(dropped) if dropped else table
    order = sorted(kept)
    marginal = marginal.permute(*range(batch), *(batch + order.index(axis) for axis in kept))
    levels = marginal.shape[-1]
    return independence_test(marginal.reshape(*marginal.shape[: batch + 2], levels ** len(given)))[1]


def _check(samples: Tensor, variables: int | None = None) -> None:
    wrong = samples.ndim < 3 or samples.shape[-2] != 2 or samples.shape[-1] < 2
    if wrong or (variables is not None and samples.shape[-1] != variables):
        raise ValueError(f"samples must be (..., E, 2, {variables or 'V'}): two a environment; got {tuple(samples.shape)}")


def bivariate_p_values(samples: Tensor, levels: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """The three tests that decide a two-variable graph.

    Args:
        samples: integers, shape (..., E, 2, 2): environment, sample within it, variable (X, Y).
        levels: number of values of each variable.

    Returns:
        p-values of Y_1 _||_ X_2 | X_1 (holds for X -> Y), of X_1 _||_ Y_2 | Y_1 (holds for Y -> X) and of X_1 _||_ Y_1 (no edge).

    Raises:
        ValueError: another shape, or values that are not integers in [0, levels).
    """
    _check(samples, 2)
    table = contingency_table(samples.flatten(-2), levels)  # axes X_1, Y_1, X_2, Y_2
    return _p_value(table, 4, 1, 2, (0,)), _p_value(table, 4, 0, 3, (1,)), _p_value(table, 4, 0, 1, ())


def bivariate_graph(p_forward: Tensor, p_backward: Tensor, p_independent: Tensor, alpha: float = 0.05) -> Tensor:
    """Decision between X -> Y (0), Y -> X (1) and no edge (2) from the three p-values of `bivariate_p_values`, same shapes.

    The pattern of rejections that fits one graph decides; where none fits, the largest p-value does.

    Raises:
        ValueError: alpha outside (0, 1), or a p-value outside [0, 1] or NaN.

    Source: the bivariate algorithm of the paper; the fallback is in its released code.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    p = torch.stack([p_forward, p_backward, p_independent], -1)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("p-values must lie in [0, 1]")
    kept = p >= alpha
    patterns = torch.tensor([[True, False, False], [False, True, False], [True, True, True]], device=p.device)
    fits = (kept.unsqueeze(-2) == patterns).all(-1)
    return torch.where(fits.any(-1), fits.long().argmax(-1), p.argmax(-1))


def recover_graphs(samples: Tensor, alpha: float = 0.05, levels: int = 2, force_sink: bool = False) -> Tensor:
    """The causal graph of each data set, from two samples in every environment.

    Order: a variable i is a sink of the variables left when X_{i;1} _||_ X_{k;2} | X_{others;1} for each other k; sinks are taken
    off layer by layer. Edges: from the nearest layers outwards, j -> k when X_j and X_k depend within a sample, given the
    variables above j's layer, the parents of k found in between, and the variables of j's layer that share a child with j.

    Args:
        samples: integers, shape (G, E, 2, V): data set, environment, sample, variable. All tests are done on G tables of
            levels^(2 V) counts.
        alpha: level of every test.
        levels: number of values of each variable.
        force_sink: where no variable passes as a sink, take the one whose worst p-value is largest. Without it, as in the
            released code, the variables left stay without edges.

    Returns:
        bool adjacency, shape (G, V, V): [g, j, k] says j -> k; always acyclic.

    Raises:
        ValueError: another shape, alpha outside (0, 1), values that are not integers in [0, levels).

    Source: the paper's multivariate algorithm. Its released code, by a slip, leaves empty the set that shares a child.
    """
    _check(samples)
    if samples.ndim != 4:
        raise ValueError(f"samples must be (G, E, 2, V), got {tuple(samples.shape)}")
    graphs, _, _, variables = samples.shape
    table = contingency_table(samples.flatten(-2), levels)

    @cache
    def across(i: int, k: int, others: frozenset[int]) -> list[float]:
        return _p_value(table, 2 * variables, i, variables + k, tuple(sorted(others))).tolist()

    @cache
    def within(j: int, k: int, given: frozenset[int]) -> list[float]:
        return _p_value(table, 2 * variables, j, k, tuple(sorted(given))).tolist()

    adjacency = torch.zeros(graphs, variables, variables, dtype=torch.bool)
    for g in range(graphs):
        edges = recover_graph(
            lambda i, k, others, g=g: across(i, k, others)[g],
            lambda j, k, given, g=g: within(j, k, given)[g],
            variables,
            alpha,
            force_sink,
        )
        for j, k in edges:
            adjacency[g, j, k] = True
    return adjacency.to(samples.device)


def recover_graph(
    across: PValue, within: PValue, variables: int, alpha: float = 0.05, force_sink: bool = False
) -> set[tuple[int, int]]:
    """The algorithm of `recover_graphs` on any test of independence, an oracle among them.

    Args:
        across: (i, k, others) -> p-value of X_{i;1} _||_ X_{k;2} | X_{others;1}, two samples of one environment.
        within: (j, k, given) -> p-value of X_j _||_ X_k | X_given in one sample.
        variables: number of variables, named 0, 1, ...
        alpha, force_sink: as there.

    Returns:
        Directed edges (j, k), j -> k.

    Raises:
        ValueError: alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    layers, left = [], frozenset(range(variables))
    while left:
        worst = {i: min((across(i, k, left - {i}) for k in left - {i}), default=1.0) for i in left}
        sinks = frozenset(i for i in left if worst[i] >= alpha)
        if not sinks and not force_sink:
            break
        sinks = sinks or frozenset([max(worst, key=worst.get)])
        layers.append(sinks)
        left -= sinks

    edges: set[tuple[int, int]] = set()
    for distance in range(1, len(layers)):
        for upper in range(distance, len(layers)):
            above = frozenset().union(*layers[upper + 1 :])
            between = frozenset().union(*layers[upper - distance + 1 : upper])
            for j, k in product(sorted(layers[upper]), sorted(layers[upper - distance])):
                mediators = {i for i in between if (i, k) in edges}
                sharing = {i for i in layers[upper] - {j} if any((i, c) in edges and (j, c) in edges for c in between)}
                if within(j, k, above | mediators | sharing) < alpha:
                    edges.add((j, k))
    return edges
