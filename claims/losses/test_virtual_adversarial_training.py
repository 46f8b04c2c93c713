"""Virtual Adversarial Training: A Regularization Method for Supervised and Semi-Supervised Learning (Miyato, Maeda, Koyama,
Ishii, 2017, arXiv 1704.03976).

Digits of 8 x 8 pixels in [0, 1], 1,400 to train on, of which ten a class (or all) have labels; the other 397 are scored.
Perceptrons with two hidden layers of 64 units, 200 steps of Adam on batches of 32 with labels and 64 without. Chosen by the
errors on other seeds, of each method alone: the learning rate (from 0.003, 0.01, 0.02 and 0.03), the norm of the virtual
adversarial perturbation (from 0.3, 0.5, 0.7 and 1; with all labels from 0.1, 0.2, 0.3 and 0.5), that of the random one (from 0.5,
1, 1.5, 2 and 3), and the weight of the entropy (from 0.1, 0.3 and 1). Both losses have the paper's weight of 1.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from paperclaims.fixtures.data.tabular import digits
from paperclaims.fixtures.models.classifiers import Draws, classify, train_classifiers
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, median_interval, paired_difference, ratio_interval
from paperclaims.impl.losses.virtual_adversarial_training import (
    conditional_entropy,
    kl_from_logits,
    random_perturbation,
    virtual_adversarial_perturbation,
)

POOL, FEW, ALL = 1400, 10, 1400
HOW = {"hidden": (64, 64), "classes": 10, "steps": 200, "batch": 32}
DIFFERS = "digits of 8 x 8 pixels and small perceptrons for SVHN, CIFAR-10 and convolutional networks"


class Method(NamedTuple):
    """Direction of the perturbation (none without), its norm, the weight of the entropy, and the learning rate."""

    direction: str = "none"
    eps: float = 0.0
    entropy: float = 0.0
    lr: float = 0.02


SUPERVISED, VAT, RANDOM = Method(lr=0.01), Method("adversarial", 0.5), Method("random", 2.0)
SAME_NORM, WITH_ENTROPY = Method("random", VAT.eps), VAT._replace(entropy=0.1)
SEMI = (SUPERVISED, RANDOM, SAME_NORM, VAT, WITH_ENTROPY)
SUPERVISED_ALL, VAT_ALL = Method(), Method("adversarial", 0.3)


@functools.cache
def problem(seeds, labels):
    """Points with labels and their classes, points without, and points to score with their classes; a row for every seed."""
    table = digits()
    x, y = torch.tensor(table.x).float() / 16, torch.tensor(table.y)
    order = Draws(seeds)(torch.randperm, len(y))
    x, y = x[order], y[order]
    hot = F.one_hot(y[:, :POOL], 10)
    rank = (hot.cumsum(1) * hot).sum(-1)  # of a point within its class
    known = (rank <= labels).nonzero()[:, 1].view(len(seeds), -1)
    labelled = x.gather(1, known.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return labelled, y.gather(1, known), x[:, :POOL], x[:, POOL:], y[:, POOL:]


@functools.cache
def network(methods, seeds, labels):
    """Layers trained by every method from the same start on the same batches, (seeds, methods, ...)."""
    x, y, pool, *_ = problem(seeds, labels)
    draws, generator = Draws([seed + 1 for seed in seeds]), torch.Generator().manual_seed(seeds[0])

    def smoothness(layers, points, method):
        """LDS plus entropy of one method, a mean for every seed."""
        logits, fixed = classify(layers, points), [tuple(part.detach() for part in layer) for layer in layers]
        where, predict = logits.detach(), functools.partial(classify, fixed)
        if method.direction == "adversarial":
            r = virtual_adversarial_perturbation(predict, points, method.eps, generator=generator, logits=where)
        else:
            r = random_perturbation(points, method.eps, generator=generator)
        smooth = kl_from_logits(where, classify(layers, points + r))
        return (smooth + method.entropy * conditional_entropy(logits) if method.entropy else smooth).mean(-1)

    def loss(layers, points, targets):
        logits = classify(layers, points)
        entropy = F.cross_entropy(logits.flatten(0, 2), targets.expand(logits.shape[:-1]).flatten(), reduction="none")
        rows = draws(torch.randint, POOL, (64,))
        unlabelled = pool.gather(1, rows.unsqueeze(-1).expand(-1, -1, pool.shape[-1]))
        own = [[(w[:, place], b[:, place]) for w, b in layers] for place in range(len(methods))]
        extra = [smoothness(own[place], unlabelled, method) for place, method in enumerate(methods) if method.direction != "none"]
        return entropy.view(logits.shape[:-1]).mean(-1).sum() + sum(part.sum() for part in extra)

    lr = torch.tensor([method.lr for method in methods])
    return train_classifiers(x, y, seeds, loss, lr=lr, settings=len(methods), **HOW)


def errors(methods, seeds, labels=FEW):
    """Wrong points to score, in per cent, (seeds,) for each method."""
    *_, x, y = problem(seeds, labels)
    wrong = classify(network(methods, seeds, labels), x.unsqueeze(1)).argmax(-1) != y.unsqueeze(1)
    return (100 * wrong.double().mean(-1)).T.numpy()


@claim(
    "With ten labels a class and 1,300 points without, virtual adversarial training makes fewer errors than the labels "
    "alone, and than perturbations in random directions of a norm tuned for them.",
    scale="reduced",
    differs=DIFFERS,
    control="a random direction at the norm of the adversarial one",
    control_breaks="errors beyond those of tuned random perturbations",
    paper_value="SVHN and CIFAR-10 without augmentation, Conv-Large: below random perturbation training on both (table 4)",
)
def test_fewer_errors_with_few_labels(arm, seeds, evidence):
    supervised, random, same_norm, vat, _ = errors(SEMI, tuple(seeds(40)))
    ours = same_norm if arm.control else vat
    for name, values in (("the labels alone", supervised), ("tuned random perturbations", random), ("the method", ours)):
        evidence.record(f"errors of {name}", mean_interval(values), unit="%")
    evidence.require("errors beyond those of the labels alone", paired_difference(ours, supervised), below=0, unit="points")
    evidence.require("errors beyond those of tuned random perturbations", paired_difference(ours, random), below=0, unit="points")


@not_reproduced(
    "with norm and learning rate tuned the entropy saves at most a tenth of VAT's errors, on the one small data set tried; the "
    "paper's gains are on natural images with convolutional networks"
)
@claim(
    "Entropy minimisation takes at least a sixth of its remaining errors away from virtual adversarial training.",
    scale="reduced",
    differs=f"{DIFFERS}; a sixth for the mean of the paper's two gains, 19 %",
    control="weight 0 for the entropy",
    control_breaks="errors with entropy minimisation over errors without",
    paper_value="with augmentation, SVHN 5.42 to 3.86 % and CIFAR-10 11.36 to 10.55 % (table 5)",
)
def test_entropy_minimisation_helps(arm, seeds, evidence):
    *_, vat, both = errors(SEMI, tuple(seeds(40)))
    ratio = ratio_interval(vat if arm.control else both, vat)
    evidence.require("errors with entropy minimisation over errors without", ratio, below=5 / 6)


@not_reproduced(
    "with 140 labels a class of these easy digits errors fall by an eighth to a fifth; the paper's gain is on the 60,000 of "
    "MNIST with larger networks and a longer training"
)
@claim(
    "With every label known, too, virtual adversarial training makes at least a third fewer errors than cross-entropy alone.",
    scale="reduced",
    differs=f"{DIFFERS}; digits of 8 x 8 pixels for MNIST; a third for the paper's two fifths",
    control="a random direction of the same norm",
    control_breaks="errors over those of cross-entropy",
    paper_value="MNIST 1.11 to 0.64 % (table 1)",
)
def test_fewer_errors_with_all_labels(arm, seeds, evidence):
    methods = (SUPERVISED_ALL, VAT_ALL._replace(direction="random") if arm.control else VAT_ALL)
    supervised, ours = errors(methods, tuple(seeds(32)), ALL)
    evidence.record("errors of cross-entropy", mean_interval(supervised), unit="%")
    evidence.require("errors over those of cross-entropy", ratio_interval(ours, supervised), below=2 / 3)


@claim(
    "Without labels, one power iteration finds a direction along which the prediction changes nearly as fast as along the "
    "worst: at the median point at least 70 % of the largest eigenvalue of the divergence's Hessian, before and after training "
    "with it.",
    scale="reduced",
    differs=f"{DIFFERS}; the 70 % are ours",
    control="noise in place of the gradient: the random direction that the iteration starts from",
    control_breaks=("curvature found, labels alone", "curvature found, virtual adversarial training"),
    paper_value="one iteration is enough, more change nothing (section 4)",
)
def test_one_power_iteration_finds_the_worst_direction(arm, seeds, evidence):
    seeds = tuple(seeds(40))
    x = problem(seeds, FEW)[3][:, :100].double()
    for name, method in (("labels alone", SUPERVISED), ("virtual adversarial training", VAT)):
        place = SEMI.index(method)
        layers = [tuple(part[:, place].double() for part in layer) for layer in network(SEMI, seeds, FEW)]
        values, vectors = torch.linalg.eigh(hessian(layers, x))
        predict, logits = functools.partial(classify, layers), classify(layers, x)
        for steps in (0,) if arm.control else (1, 2):
            generator = torch.Generator().manual_seed(seeds[0])
            d = virtual_adversarial_perturbation(predict, x, 1.0, steps=steps, xi=1e-6, generator=generator)
            found = ((vectors.mT @ d.unsqueeze(-1)).squeeze(-1).square() * values).sum(-1) / values[..., -1]
            interval = median_interval(found.median(-1).values.numpy())
            if steps < 2:
                evidence.require(f"curvature found, {name}", interval, above=0.7)
                change = torch.stack([kl_from_logits(logits, predict(x + sign * VAT.eps * d)) for sign in (1, -1)])
                worse = (change[0] / change.amax(0)).median(-1).values.mean()
                evidence.record(f"change at the norm used, over that of the better sign, {name}", worse)
            else:
                evidence.record(f"curvature found by a second iteration, {name}", interval)


def hessian(layers, x):
    """Of D(r, x) by r at r = 0: the Fisher information J' (diag p - p p') J of the class, (..., d, d) for points (..., d)."""
    x = x.clone().requires_grad_()
    logits = classify(layers, x)
    rows = [torch.autograd.grad(logits[..., c].sum(), x, retain_graph=True)[0] for c in range(logits.shape[-1])]
    p, jacobian = logits.detach().softmax(-1).unsqueeze(-1), torch.stack(rows, -2)
    centred = p.sqrt() * (jacobian - (p * jacobian).sum(-2, keepdim=True))
    return centred.mT @ centred
