"""PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions (Leng et al., 2022, arXiv 2204.12511).

MNIST-1D, as it is and with 30 % of the training and validation labels drawn at random. Every loss has five trials, from which
each seed takes the one with the best accuracy on its 800 validation points; 3000 other points are scored. Cross-entropy and focal
loss choose learning rate, weight decay and gamma; Poly-1 keeps the learning rate and decay that are best for cross-entropy on
other seeds and chooses eps_1.
"""

import functools

import pytest
import torch

from paperclaims.fixtures.data.mnist1d import mnist1d
from paperclaims.fixtures.models.classifiers import Draws, classify, train_classifiers
from paperclaims.fixtures.protocol import claim, inconclusive, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, paired_difference
from paperclaims.impl.losses.polyloss import poly_cross_entropy, poly_focal_loss

TRAIN, VALIDATION, STEPS = 1200, 800, 300
EPSILONS = (-1.0, -0.5, 1.0, 2.0, 4.0)
DECAY = {"clean": 0.15, "noisy": 0.2}
DIFFERS = "MNIST-1D and a perceptron with 32 hidden units, 300 steps, for ImageNet, COCO and Waymo"


def trials(task):
    """Loss, its parameter (eps_1, or gamma), learning rate and weight decay of every trial."""
    decay = DECAY[task]
    entropy = [(0.08, decay), (0.08, decay / 2), (0.05, decay), (0.05, decay / 2), (0.12, decay)]
    focal = [(0.5, 0.08), (1.0, 0.08), (2.0, 0.08), (0.5, 0.05), (1.0, 0.05)]
    return [
        *(("cross-entropy", 0.0, lr, wd) for lr, wd in entropy),
        *(("focal", gamma, lr, decay) for gamma, lr in focal),
        *(("Poly-1", eps, 0.08, decay) for eps in EPSILONS),
    ]


def with_noise(draws, labels, task):
    """Labels (seeds, n), 30 % of them drawn at random from all classes where the task says so."""
    flipped, other = draws(torch.rand, labels.shape[-1:]) < 0.3, draws(torch.randint, 10, labels.shape[-1:])
    return torch.where(flipped, other, labels) if task == "noisy" else labels


@functools.cache
def trained(task, seeds):
    """Accuracy on validation and test points, and mean target probability and overconfidence on the latter, in per cent.

    All (seeds, trials); the overconfidence is the mean largest probability less the accuracy.
    """
    data, draws, planned = mnist1d(), Draws(seeds), trials(task)
    x = torch.cat([torch.tensor(part.x) for part in data]).float()
    y = torch.cat([torch.tensor(part.y) for part in data])
    order = draws(torch.randperm, len(y))
    x, y = x[order], y[order]
    known = with_noise(draws, y[:, : TRAIN + VALIDATION], task)

    def loss(layers, points, targets):
        values = []
        for scores, (kind, parameter, _, _) in zip(classify(layers, points).unbind(1), planned, strict=True):
            form = functools.partial(poly_focal_loss, eps=0.0, gamma=parameter) if kind == "focal" else poly_cross_entropy
            given = {} if kind == "focal" else {"eps": parameter}
            values.append(form(scores, targets.squeeze(1), reduction="none", **given).mean(-1))
        return torch.stack(values, 1)

    lr, decay = (torch.tensor([trial[place] for trial in planned]) for place in (2, 3))
    how = {"hidden": (32,), "classes": 10, "steps": STEPS, "batch": 64, "settings": len(planned)}
    layers = train_classifiers(x[:, :TRAIN], known[:, :TRAIN], seeds, loss, lr=lr, weight_decay=decay, **how)
    right = classify(layers, x[:, TRAIN : TRAIN + VALIDATION].unsqueeze(1)).argmax(-1) == known[:, TRAIN:].unsqueeze(1)
    p = classify(layers, x[:, TRAIN + VALIDATION :].unsqueeze(1)).softmax(-1)
    true = y[:, TRAIN + VALIDATION :].unsqueeze(1)
    accuracy = (p.argmax(-1) == true).double().mean(-1)
    own = p.gather(-1, true.unsqueeze(-1).expand(*p.shape[:-1], 1)).squeeze(-1).double().mean(-1)
    return tuple(100 * part for part in (right.double().mean(-1), accuracy, own, p.amax(-1).double().mean(-1) - accuracy))


def column(task, kind, parameter):
    return next(place for place, trial in enumerate(trials(task)) if trial[:2] == (kind, parameter))


def tuned(task, seeds, kind, at_random=None):
    """Test accuracy (seeds,) of the trial that validates best, or of one at random."""
    places = torch.tensor([place for place, trial in enumerate(trials(task)) if trial[0] == kind])
    validated, accuracy, *_ = trained(task, seeds)
    chosen = validated[:, places].argmax(1) if at_random is None else torch.as_tensor(at_random)
    return accuracy[:, places].gather(1, chosen.unsqueeze(1)).squeeze(1).numpy()


@inconclusive(
    "against losses whose learning rate, decay and gamma are tuned by as many trials the gain is about 0.8 points over "
    "cross-entropy and 1.3 over focal loss on other seeds, and 16 seeds do not tell that from the paper's 0.6"
)
@claim(
    "With its one coefficient tuned for each task Poly-1 is 0.6 points, the paper's gain on ImageNet-21k, more accurate than "
    "cross-entropy and than focal loss.",
    scale="reduced",
    differs=f"{DIFFERS}; mean over two tasks, and the baselines tuned by as many trials",
    control="eps_1 drawn at random from the same grid, the training unchanged",
    control_breaks=("accuracy gained over cross-entropy", "accuracy gained over focal loss"),
    paper_value="ImageNet-21k 45.8 to 46.4 (EfficientNetV2-L)",
)
def test_tuned_coefficient_gains(arm, seeds, rng, evidence):
    seeds = tuple(seeds(16))
    random = rng.integers(len(EPSILONS), size=(2, len(seeds)))
    gains = {"cross-entropy": 0.0, "focal": 0.0}
    for task, places in zip(DECAY, random, strict=True):
        ours = tuned(task, seeds, "Poly-1", places if arm.control else None)
        for kind in gains:
            gain = ours - tuned(task, seeds, kind)
            evidence.record(f"gain over {kind}, {task} labels", mean_interval(gain), unit="points")
            gains[kind] = gains[kind] + gain / 2
    evidence.require("accuracy gained over cross-entropy", mean_interval(gains["cross-entropy"]), above=0.6, unit="points")
    evidence.require("accuracy gained over focal loss", mean_interval(gains["focal"]), above=0.6, unit="points")


@not_reproduced(
    "raising the first coefficient helps on both tasks here, with clean and with noisy labels; the paper's task with eps_1 = -1 "
    "is detection, where nearly all candidates are negative, and none such was tried"
)
@claim(
    "Whether to raise or to lower the first coefficient depends on the task: on one of two, eps_1 = -1 is better than eps_1 = 2.",
    scale="reduced",
    differs=DIFFERS,
    control="eps_1 = 2 on both sides: the coefficient is not changed",
    control_breaks=("accuracy gained by lowering it, clean labels", "accuracy gained by lowering it, noisy labels"),
    paper_value="eps_1 = 2 on ImageNet, -1 in detection on COCO",
)
def test_best_sign_depends_on_the_task(arm, seeds, evidence):
    seeds = tuple(seeds(16))
    for task in DECAY:
        _, accuracy, *_ = trained(task, seeds)
        low, high = (accuracy[:, column(task, "Poly-1", eps)] for eps in (2.0 if arm.control else -1.0, 2.0))
        gain = paired_difference(low, high)
        evidence.require(f"accuracy gained by lowering it, {task} labels", gain, above=0.25, unit="points")


@claim(
    "The first coefficient sets how confident the model is: from eps_1 = -1 to 4 the mean probability of the right class on new "
    "points rises by over three points.",
    scale="reduced",
    differs=DIFFERS,
    control="eps_1 = 4 on both sides: the coefficient is not changed",
    control_breaks="probability of the right class gained",
    paper_value="raises the confidence on ImageNet, where cross-entropy's is too low, and lowers it on COCO (section 6)",
)
@pytest.mark.parametrize("task", DECAY)
def test_coefficient_sets_the_confidence(arm, task, seeds, evidence):
    seeds = tuple(seeds(16))
    _, accuracy, own, beyond = trained(task, seeds)
    low, high = (column(task, "Poly-1", eps) for eps in (4.0 if arm.control else -1.0, 4.0))
    for eps in EPSILONS:
        place = column(task, "Poly-1", eps)
        evidence.record(f"confidence beyond accuracy, eps_1 = {eps}", beyond[:, place].mean(), unit="points")
        evidence.record(f"accuracy, eps_1 = {eps}", accuracy[:, place].mean(), unit="%")
    evidence.require(
        "probability of the right class gained", paired_difference(own[:, high], own[:, low]), above=3.0, unit="points"
    )


@claim(
    "The first coefficient acts on what is already learned: it leaves the gradient of a hopeless example alone and multiplies "
    "that of a certain one by 1 + eps_1.",
    scale="paper",
    control="eps_1 = 0, cross-entropy",
    control_breaks="gradient at p_t = 0.999 over cross-entropy's, less 1 + eps_1",
    paper_value="1 + eps_1 is the coefficient of the series' first term, the only one with a gradient at p_t = 1 (section 4)",
)
@pytest.mark.parametrize("eps", [-1.0, 2.0])
def test_what_the_first_coefficient_acts_on(arm, eps, rng, evidence):
    others = torch.from_numpy(rng.standard_normal((50, 9)))
    targets = torch.zeros(50, dtype=torch.int64)
    for p, expected in ((0.001, 1.0), (0.999, 1 + eps)):
        own = others.logsumexp(-1, keepdim=True) + torch.logit(torch.tensor(p, dtype=torch.float64))
        logits = torch.cat([own, others], -1).requires_grad_()
        losses = [poly_cross_entropy(logits, targets, value, reduction="sum") for value in (0.0 if arm.control else eps, 0.0)]
        ours, plain = (torch.autograd.grad(loss, logits)[0] for loss in losses)
        off = (ours / plain - expected).abs().max().item()
        evidence.require(f"gradient at p_t = {p} over cross-entropy's, less {'1' if p < 0.5 else '1 + eps_1'}", off, below=0.01)
