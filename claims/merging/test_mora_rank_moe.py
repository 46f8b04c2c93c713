"""MoRA: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive Learning (Lu et al., 2025, arXiv 2506.21035 v2).

Handwritten digits arrive as five tasks: the same ten classes, every task on a noise pattern of its own, |image - 0.4 pattern|
(as MNIST-M puts digits on photographs). The backbone (64-128-64, pretrained on 500 plain digits, frozen) reads features against
fixed anchors of the classes, as CLIP does against its text embeddings, so that only adapters differ. Every task trains 4 new
ranks a layer; tests name no task. Adapters matter: the backbone alone is some 30 points below adapters that train on all tasks
at once, and some 13 below adapters behind a router after the last task (recorded). The contrast is the least of 0.3, 0.4, 0.45,
0.5 and 1 at which the latter gained 15 points in a first trial, looking at them and not at MoRA; turned digits were left as they
gained 6 there, with MoRA ahead by as much as here.

The rivals have the same 4 ranks a task, freeze them too, and get their router on top. Their router's rows for old experts are
frozen as well. On other seeds (100 and up), learning rates (0.001 to 0.03) and temperatures (0.05 to 0.5, a router's 0.1 to 10;
as many of each) were chosen for every method by its final accuracy, and the number of seeds by the spread.
"""

import functools
import math

import torch
import torch.nn.functional as F

from paperclaims.fixtures.data.tabular import digits
from paperclaims.fixtures.measurement import count_flops, fake_mode
from paperclaims.fixtures.models.classifiers import Draws
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import paired_difference
from paperclaims.impl.merging.mora_rank_moe import mixture_of_ranks, self_activated_gates

SEEDS, TASKS, RANK, SIZES = 80, 5, 4, ((64, 128), (128, 64))
CONTRAST, PRETRAIN, TRAIN, STEPS, BATCH = 0.4, 500, 997, 100, 32
DIFFERS = "digits on five noise patterns and a small MLP for CLIP and language models, 4 ranks a task"
SCRAMBLED = "activations shuffled over the experts, anew when the pool grows, before they gate: same budget, no self-activation"


class Ranks:
    """A pool of rank-1 experts in two layers for a stack of seeds; `gates` says how much of each an input gets."""

    routed, temperature, learning_rate = 0, 0.1, 0.01

    def __init__(self, budget=RANK, scrambled=False):
        self.budget, self.scrambled, self.tasks = budget, scrambled, [[], []]

    def add(self, draws, rank):
        """New experts for the next task in both layers: the parameters to train."""
        new = []
        for layer, (inputs, outputs) in zip(self.tasks, SIZES, strict=True):
            uniform = draws(torch.rand, (rank + self.routed, inputs))
            key, router = ((2 * uniform - 1) / inputs**0.5).split([rank, self.routed], dim=1)
            layer.append([part.clone().requires_grad_() for part in (key, torch.zeros(len(key), outputs, rank), router)])
            new += layer[-1]
        return new

    def pool(self, layer):
        keys, values, router = zip(*self.tasks[layer], strict=True)
        return torch.cat(keys, 1), torch.cat(values, 2), torch.cat(router, 1)

    def gates(self, x, activations, router):
        if self.scrambled:
            order = torch.randperm(activations.shape[-1], generator=torch.Generator().manual_seed(activations.shape[-1]))
            activations = activations[..., order]
        return self_activated_gates(activations, temperature=self.temperature, budget=self.budget)

    def __call__(self, layer, x, y):
        """The layer's output y for its input x, with the update."""
        keys, values, router = self.pool(layer)
        activations = x @ keys.mT
        return torch.baddbmm(y, self.gates(x, activations, router) * activations, values.mT)

    def active(self, x):
        """Parameters of the first layer's experts with a gate, for one input on average."""
        keys, _, router = self.pool(0)
        return sum(SIZES[0]) * (self.gates(x, x @ keys.mT, router) > 0).sum(-1).double().mean().item()


class RoutedRanks(Ranks):
    """The same experts under a learned router: one row of it for each rank, softmax over all, the best `budget` stay."""

    routed, temperature = RANK, 1.0

    def gates(self, x, activations, router):
        gates = torch.softmax(x @ router.mT / self.temperature, dim=-1)
        best = gates.topk(min(self.budget * self.routed // RANK, gates.shape[-1]), dim=-1)
        return torch.zeros_like(gates).scatter(-1, best.indices, best.values).repeat_interleave(RANK // self.routed, -1)


class RoutedAdapters(RoutedRanks):
    """LoRA-MoE: one row of the router for each task's whole adapter; the best one is active."""

    routed = 1


class OneAdapter(Ranks):
    """LoRA without experts: 4 ranks a layer, always active, that every task trains on."""

    learning_rate = 0.003

    def add(self, draws, rank):
        if not self.tasks[0]:
            return super().add(draws, rank)
        return [part.requires_grad_() for layer in self.tasks for part in layer[0]]

    def gates(self, x, activations, router):
        return torch.ones_like(activations)


def features(x, backbone, adapters=None):
    for layer, (weight, bias) in enumerate(backbone):
        y = torch.baddbmm(bias, x, weight)
        if adapters is not None:
            y = adapters(layer, x, y)
        x = y.relu() if layer == 0 else y
    return F.normalize(x, dim=-1)


def descend(parameters, learning_rate, batches, model):
    """Adam on the cross entropy of `model(x)` for every batch (x, labels) of a stack of seeds."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    for x, labels in batches:
        loss = F.cross_entropy(model(x).flatten(0, 1), labels.flatten()) * len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


@functools.cache
def problem(seeds):
    """Images (seeds, tasks, n, 64) and labels (seeds, n) in an order of every seed's own, class anchors, pretrained backbone."""
    draws, table, stack = Draws(seeds), digits(), torch.arange(len(seeds)).unsqueeze(1)
    order = draws(torch.randperm, len(table.y))
    x, y = torch.tensor(table.x, dtype=torch.float32)[order] / 16, torch.tensor(table.y)[order]
    anchors = 10 * torch.linalg.qr(draws(torch.randn, (64, 10)))[0]
    backbone = [(draws(torch.randn, size) * (2 / size[0]) ** 0.5, torch.zeros(len(seeds), 1, size[1])) for size in SIZES]
    rows = draws(torch.randint, PRETRAIN, (100, 128)).unbind(1)
    parameters = [part.requires_grad_() for layer in backbone for part in layer]
    descend(parameters, 3e-3, ((x[stack, row], y[stack, row]) for row in rows), lambda x: features(x, backbone) @ anchors)
    patterns = CONTRAST * draws(torch.randint, 2, (TASKS, 1, 64))
    return (x[:, None, PRETRAIN:] - patterns).abs(), y[:, PRETRAIN:], anchors, backbone


@functools.cache
def learn(method, seeds, count=SEEDS, stages=TASKS, **options):
    """The tasks one after another (or all in one stage), for the first `count` seeds.

    Returns: accuracies (count, after stage, of task) with the backbone's own as stage 0, log drift (count,), active parameters.
    """
    images, labels, anchors = (part[:count] for part in problem(seeds)[:3])
    backbone = [(weight[:count], bias[:count]) for weight, bias in problem(seeds)[3]]
    draws, adapters, stack = Draws(seeds[:count]), method(**options), torch.arange(count).unsqueeze(1)
    train, test = images[:, :, :TRAIN].flatten(1, 2), images[:, :, TRAIN:].unbind(1)

    def look(adapters=None):
        places = [features(x, backbone, adapters) for x in test]
        right = [((place @ anchors).argmax(-1) == labels[:, TRAIN:]).float().mean(-1) for place in places]
        return places[0], 100 * torch.stack(right, -1)

    looks = [look()]
    for tasks in torch.arange(TASKS).chunk(stages):
        size = (STEPS * len(tasks), BATCH)
        rows, of_task = draws(torch.randint, TRAIN, size).unbind(1), tasks[draws(torch.randint, len(tasks), size)].unbind(1)
        batches = ((train[stack, row + TRAIN * task], labels[stack, row]) for row, task in zip(rows, of_task, strict=True))
        parameters = adapters.add(draws, RANK * len(tasks))
        descend(parameters, adapters.learning_rate, batches, lambda x: features(x, backbone, adapters) @ anchors)
        looks.append(look(adapters))
    places, accuracies = zip(*looks, strict=True)
    moved, learned = ((places[a] - places[b]).square().sum((1, 2)) for a, b in ((-1, 1), (1, 0)))
    return torch.stack(accuracies, 1).numpy(), (moved / learned).log().numpy(), adapters.active(test[0])


def final(accuracies):
    """Mean accuracy over all tasks after the last one, shape (seeds,)."""
    return accuracies[:, -1].mean(-1)


def forgetting(accuracies):
    """Best (since the first task) minus final accuracy, mean over all tasks but the last, shape (seeds,)."""
    return (accuracies[:, 1:].max(1) - accuracies[:, -1])[:, :-1].mean(-1)


@not_reproduced(
    "did not hold here: self-activated ranks get further on every task and then forget about as many points; the share is this "
    "suite's (the paper gives none), and whether they forget one point less is more than these seeds can tell"
)
@claim(
    "With as many active ranks, rank-1 experts that activate themselves forget at least a quarter less than LoRA adapters behind "
    "a router.",
    scale="reduced",
    differs=DIFFERS,
    control=SCRAMBLED,
    paper_value="no number: mitigates forgetting (abstract)",
)
def test_less_forgetting_than_adapters_behind_a_router(arm, seeds, evidence):
    seeds = tuple(seeds(SEEDS))
    ours, rival = (
        forgetting(learn(method, seeds, **options)[0])
        for method, options in ((Ranks, {"scrambled": arm.control}), (RoutedAdapters, {}))
    )
    evidence.record("forgetting, ranks", ours.mean(), unit="points")
    evidence.record("forgetting, adapters behind a router", rival.mean(), unit="points")
    evidence.record("forgetting avoided", paired_difference(rival, ours), unit="points")
    evidence.require("below three quarters of the rival's by", paired_difference(0.75 * rival, ours), above=0.0, unit="points")


@claim(
    "With as many active ranks, rank-1 experts that activate themselves end up more accurate than LoRA adapters behind a router: "
    "by a point at least.",
    scale="reduced",
    differs=f"{DIFFERS}; one adapter of as many ranks that all tasks train does as well (recorded)",
    control=SCRAMBLED,
    paper_value="no number: enhances continual learning over adapter-level LoRA-MoE (abstract)",
)
def test_more_accurate_than_adapters_behind_a_router(arm, seeds, evidence):
    seeds = tuple(seeds(SEEDS))
    ours, _, _ = learn(Ranks, seeds, scrambled=arm.control)
    rival, _, _ = learn(RoutedAdapters, seeds)
    for name, accuracies in (("ranks", ours), ("adapters behind a router", rival)):
        evidence.record(f"final accuracy, {name}", final(accuracies).mean(), unit="%")
        seen = [accuracies[:, t, :t].mean() for t in range(1, TASKS + 1)]
        evidence.curve("accuracy on the tasks so far", range(1, TASKS + 1), seen, series=name, x_label="tasks", y_label="%")
    evidence.record("accuracy of the backbone alone", rival[:, 0].mean(), unit="%")
    together, _, _ = learn(OneAdapter, seeds, count=8, stages=1)
    evidence.record("final accuracy, all ranks and tasks at once (8 seeds)", final(together).mean(), unit="%")
    plain, _, _ = learn(OneAdapter, seeds, count=8)
    gain = paired_difference(final(ours)[:8], final(plain))
    evidence.record("gain in final accuracy over one adapter for all tasks (8 seeds)", gain, unit="points")
    evidence.require("gain in final accuracy", paired_difference(final(ours), final(rival)), above=1.0, unit="points")


@not_reproduced(
    "did not hold here: a router over the same rank-1 experts, its rows for old ones frozen, leaves the features as much in "
    "place; the share is this suite's (the paper gives none)"
)
@claim(
    "Self-activation keeps what was learned in place where routing degrades: on the first task's inputs, later tasks move the "
    "features at least a quarter less (squared, against what the first task taught) than with a router over the same experts.",
    scale="reduced",
    differs=f"{DIFFERS}; the router's rows for old experts are frozen",
    control="the rank-1 experts are gated by the router instead",
    central=False,
    paper_value="no number: earlier tasks' routing degrades as experts accumulate (abstract)",
)
def test_self_activation_drifts_less_than_a_router(arm, seeds, evidence):
    seeds, count = tuple(seeds(SEEDS)), 40
    _, rival, _ = learn(RoutedRanks, seeds, count=count)
    ours = rival if arm.control else learn(Ranks, seeds, scrambled=False)[1][:count]
    evidence.record("drift, self-activated", math.exp(ours.mean()))
    evidence.record("drift, router", math.exp(rival.mean()))
    evidence.require("log of the ratio of drifts", paired_difference(ours, rival), below=math.log(0.75))


@claim(
    "Half the active adapter parameters of LoRA adapters behind a router are enough: the final accuracy stays within 2 points.",
    scale="reduced",
    differs=f"{DIFFERS}; counted are experts with a gate, not the keys and the router read to choose them",
    central=False,
    control="as many ranks active as in the rival's adapter",
    control_breaks="active parameters over the rival's",
    paper_value="fewer active parameters (abstract)",
)
def test_fewer_active_parameters(arm, seeds, evidence):
    seeds, count = tuple(seeds(SEEDS)), 40
    ours, _, active = learn(Ranks, seeds, scrambled=False) if arm.control else learn(Ranks, seeds, count=count, budget=RANK // 2)
    rival, _, active_rival = learn(RoutedAdapters, seeds)
    evidence.record("active adapter parameters a layer, ranks", active)
    evidence.record("active adapter parameters a layer, adapters behind a router", active_rival)
    evidence.require("active parameters over the rival's", active / active_rival, below=0.5)
    gain = paired_difference(final(ours)[:count], final(rival)[:count])
    evidence.require("gain in final accuracy", gain, above=-2.0, unit="points")


@not_reproduced(
    "self-activation multiplies the keys of all ranks to choose some: its cost grows with the pool, a router's hardly; the paper "
    "claims fewer active parameters, not this, and against two active adapters of rank 64 it would hold at ten tasks"
)
@claim(
    "Fewer active ranks make the update cheaper: at the width of CLIP's ViT-B/16, with ten tasks of 16 ranks and 8 ranks active, "
    "it takes no more operations a token than the best of ten LoRA adapters of rank 16 behind a router.",
    scale="reduced",
    differs="ranks, budget and number of tasks chosen here; one layer, counted, not trained",
    control="no activation budget: every rank's value is multiplied as well",
    central=False,
    paper_value="no number for operations; fewer active parameters (abstract)",
)
def test_operations_per_token(arm, evidence):
    width, rank, tasks = 768, 16, range(1, 21)
    budget = None if arm.control else 8

    def ratio(pool):
        x, router, key = torch.empty(1, width), torch.empty(width, pool), torch.empty(rank, width)
        keys, values = torch.empty(pool * rank, width), torch.empty(width, pool * rank)
        ours = count_flops(lambda: mixture_of_ranks(x, keys, values, temperature=0.2, budget=budget, gather=not arm.control))
        return ours / count_flops(lambda: (x @ router, x @ key.mT @ values[:, :rank].mT))

    with fake_mode():
        ratios = [ratio(pool) for pool in tasks]
    evidence.curve("operations over LoRA-MoE's", tasks, ratios, x_label="tasks", y_label="ratio")
    evidence.require("operations over the rival's after ten tasks", ratios[9], below=1.0)
