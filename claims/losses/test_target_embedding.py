"""Beyond One-hot Encoding: lower dimensional target embedding (Rodriguez, Bautista, Gonzàlez, Escalera, 2018, arXiv 1806.10805).

Numbers of two digits, 100 classes, each a pair of scanned digits of 8 x 8 pixels side by side: 3,000 pairs to train on, made of
1,000 digits, and 1,000 to score, made of the other 797. Perceptrons with 128 hidden units, 400 steps of Adam on batches of 64.
Learning rates (0.01 to 0.06 for cross-entropy, 0.003 to 0.06 for codes), the form of the loss (squared, at several scales of the
codes, or cosine) and dimensions (8 to 64 for the eigen-representation, 32 to 96 for random codes) were chosen by the accuracy on
other seeds, not all of them crossed: the cosine for all codes, 64 dimensions of random ones, 16 of the eigen-representation,
whose similarity is that of the mean training images of the classes. Classes that are pairs of digits are alike in half of their
pixels; the nearest class mean, without a training, is right for 78 % of the new points.
"""

import functools

import torch

from paperclaims.fixtures.data.tabular import digits
from paperclaims.fixtures.models.classifiers import classify, train_classifiers
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, non_inferiority, paired_difference, proportion_interval, ratio_interval
from paperclaims.impl.losses.target_embedding import (
    class_similarity,
    code_loss,
    distortion_bound,
    eigen_codes,
    nearest_code,
    random_codes,
)

CLASSES, KNOWN, NEW, STEPS, EVERY, SEEDS = 100, 3000, 1000, 400, 10, 16
RATES = {"cross-entropy": 0.02, "softened": 0.02, "one-hot": 0.01, "random": 0.01, "eigen": 0.03, "permuted": 0.03}
ENTROPIES = ("cross-entropy", "softened")
DIFFERS = (
    "two-digit numbers and a small perceptron for CIFAR-100, CUB-200, ImageNet and Places; loss and similarity reconstructed"
)


def problem(seed):
    """Points and classes to train on and to score, of one seed."""
    table, generator = digits(), torch.Generator().manual_seed(seed)
    x, y = torch.tensor(table.x).float() / 16, torch.tensor(table.y)
    order, parts = torch.randperm(len(y), generator=generator), []
    for rows, count in ((order[:1000], KNOWN), (order[1000:], NEW)):
        tens, units = (rows[torch.randint(len(rows), (count,), generator=generator)] for _ in range(2))
        parts += [torch.cat([x[tens], x[units]], 1), 10 * y[tens] + y[units]]
    return parts


def codes(kind, x, y, generator):
    """Rows of length 1 for the classes; the permuted ones are the eigen-representation, given to other classes."""
    if kind in ("eigen", "permuted"):
        own = eigen_codes(class_similarity(x, y, CLASSES), 16)
        return own[torch.randperm(CLASSES, generator=generator)] if kind == "permuted" else own
    return random_codes(CLASSES, 64, signs=True, generator=generator) if kind == "random" else torch.eye(CLASSES)


def soft_labels(x, y):
    """Distributions over the classes, a row for each: its own with 0.7, the others by the eighth power of their similarity."""
    close = class_similarity(x, y, CLASSES) ** 8
    return 0.7 * torch.eye(CLASSES) + 0.3 * close / close.sum(1, keepdim=True)


@functools.cache
def trained(seeds):
    """Accuracy on new points in per cent, by kind of target: every EVERY steps and at the end, (times, seeds)."""
    x, y, x_new, y_new = (torch.stack(parts) for parts in zip(*map(problem, seeds), strict=True))
    rows, offsets = list(zip(x, y, seeds, strict=True)), CLASSES * torch.arange(len(seeds)).unsqueeze(1)
    # One table of all seeds, one below the other; a label plus its seed's offset is a row of it.
    tables = {"cross-entropy": torch.eye(CLASSES).repeat(len(seeds), 1)}
    tables["softened"] = torch.cat([soft_labels(points, classes) for points, classes, _ in rows])
    for kind in list(RATES)[len(tables) :]:
        made = [codes(kind, points, classes, torch.Generator().manual_seed(seed + 1)) for points, classes, seed in rows]
        tables[kind] = torch.cat(made)
    steps, curve = iter(range(STEPS)), []

    def measure(layers):
        found = {}
        for (kind, table), output in zip(tables.items(), classify(layers, x_new.unsqueeze(1)).unbind(1), strict=True):
            own = table.view(len(seeds), CLASSES, -1)
            nearest = [nearest_code(o[:, : c.shape[1]], c) for o, c in zip(output, own, strict=True)]
            classes = output.argmax(-1) if kind in ENTROPIES else torch.stack(nearest)
            found[kind] = 100 * (classes == y_new).double().mean(-1)
        curve.append(found)

    def loss(layers, points, labels):
        if next(steps) % EVERY == 0:
            with torch.no_grad():
                measure(layers)
        labels, values = labels.squeeze(1) + offsets, []
        for (kind, table), output in zip(tables.items(), classify(layers, points).unbind(1), strict=True):
            if kind in ENTROPIES:
                values.append(-(table[labels] * output.log_softmax(-1)).sum(-1))
            else:
                values.append(code_loss(output[..., : table.shape[1]], labels, table, form="cosine", reduction="none"))
        return torch.stack([value.mean(-1) for value in values], 1)

    how = {"hidden": (128,), "classes": CLASSES, "steps": STEPS, "batch": 64, "settings": len(RATES)}
    measure(train_classifiers(x, y, seeds, loss, lr=torch.tensor(list(RATES.values())), **how))
    return {kind: torch.stack([row[kind] for row in curve]) for kind in RATES}


def updates(accuracy):
    """Steps, by kind, (seeds,), to nine tenths of what cross-entropy reaches at the end; all of them where never."""
    target = 0.9 * accuracy["cross-entropy"][-1]
    return {kind: EVERY * ((rows >= target).cumsum(0) == 0).sum(0).clamp(1, STEPS // EVERY) for kind, rows in accuracy.items()}


def study(evidence, seeds):
    accuracy = trained(seeds)
    needed = {kind: steps.double().numpy() for kind, steps in updates(accuracy).items()}
    for kind, rows in accuracy.items():
        evidence.curve("accuracy", range(0, STEPS + 1, EVERY), rows.mean(1).tolist(), series=kind, x_label="updates", y_label="%")
        evidence.record(f"accuracy, {kind}", mean_interval(rows[-1].numpy()), unit="%")
        evidence.record(f"updates to nine tenths of cross-entropy's accuracy, {kind}", float(needed[kind].mean()))
    return needed, {kind: rows[-1].numpy() for kind, rows in accuracy.items()}


@claim(
    "With codes in 16 dimensions, the eigen-representation of 100 classes, nine tenths of the accuracy of cross-entropy are "
    "reached in at most four fifths of the updates, and in the end at most two percentage points are lost.",
    scale="reduced",
    differs=f"{DIFFERS}; four fifths and two points are ours",
    control="the same codes, given to other classes",
    control_breaks=("updates over those of cross-entropy", "accuracy lost against cross-entropy"),
    paper_value="the convergence of random projections, and competitive accuracy",
)
def test_eigen_codes_converge_faster(arm, seeds, evidence):
    needed, accuracy = study(evidence, tuple(seeds(SEEDS)))
    kind = "permuted" if arm.control else "eigen"
    evidence.require("updates over those of cross-entropy", ratio_interval(needed[kind], needed["cross-entropy"]), below=0.8)
    lost = non_inferiority(accuracy[kind], accuracy["cross-entropy"])
    evidence.require("accuracy lost against cross-entropy", lost, below=2.0, unit="points")


@not_reproduced(
    "random codes do not get there within the training, nor do one-hot vectors under the same loss, which come closer; the "
    "paper's networks are deep, and how its cross-entropy was tuned could not be read"
)
@claim(
    "With random codes in 64 dimensions nine tenths of the accuracy of cross-entropy on 100 classes are reached in at most half "
    "of the updates.",
    scale="reduced",
    differs=f"{DIFFERS}; a half is ours",
    control="one-hot codes, nothing is projected",
    control_breaks="updates over those of cross-entropy",
    paper_value="drastically faster convergence with random projections",
)
def test_random_codes_converge_faster(arm, seeds, evidence):
    needed, _ = study(evidence, tuple(seeds(SEEDS)))
    ratio = ratio_interval(needed["one-hot" if arm.control else "random"], needed["cross-entropy"])
    evidence.require("updates over those of cross-entropy", ratio, below=0.5)


@claim(
    "It is the embedding, not only the similarity of classes: with the eigen-representation nine tenths of the accuracy of "
    "cross-entropy are reached in fewer updates than with cross-entropy on labels softened by that similarity.",
    scale="reduced",
    differs=f"{DIFFERS}; the paper has no such baseline",
    control="the same codes, given to other classes",
    control_breaks="updates over those of softened labels",
    central=False,
)
def test_embedding_beats_softened_labels(arm, seeds, evidence):
    needed, _ = study(evidence, tuple(seeds(SEEDS)))
    ratio = ratio_interval(needed["permuted" if arm.control else "eigen"], needed["softened"])
    evidence.require("updates over those of softened labels", ratio, below=1.0)


@claim(
    "The eigen-representation is at least five percentage points more accurate than random codes, which have four times its "
    "dimensions.",
    scale="reduced",
    differs=f"{DIFFERS}; five points are ours",
    control="the same codes, given to other classes",
    control_breaks="accuracy gained over random codes",
    paper_value="improves the accuracy of random projections",
)
def test_eigen_codes_are_more_accurate(arm, seeds, evidence):
    _, accuracy = study(evidence, tuple(seeds(SEEDS)))
    gained = paired_difference(accuracy["permuted" if arm.control else "eigen"], accuracy["random"])
    evidence.require("accuracy gained over random codes", gained, above=5.0, unit="points")


@claim(
    "Random codes keep the classes apart: among 1,000 classes in 400 dimensions a squared distance below half or above one and a "
    "half of its mean occurs no more often than the bound of Johnson and Lindenstrauss says.",
    scale="paper",
    control="codes of rank 8 in as many dimensions",
    control_breaks="share of draws with a distance outside",
    paper_value="random projections keep distances (section 3)",
)
def test_random_codes_keep_distances(arm, seeds, evidence):
    classes, k, draws, outside = 1000, 400, 200, 0
    generator, bound = torch.Generator().manual_seed(seeds(1)[0]), distortion_bound(1000, 400, 0.5)
    for _ in range(draws):
        made = random_codes(classes, 8 if arm.control else k, generator=generator)
        if arm.control:
            made = made @ random_codes(8, k, generator=generator)
        squares = made.square().sum(1)
        distances = squares + squares.unsqueeze(1) - 2 * made @ made.T
        distances.fill_diagonal_(2.0)
        outside += bool(((distances < 1) | (distances > 3)).any())
    evidence.record("bound", bound)
    evidence.require("share of draws with a distance outside", proportion_interval(outside, draws), below=bound)
