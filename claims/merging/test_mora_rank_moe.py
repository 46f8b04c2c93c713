"""MoRA: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive Learning (Lu et al., 2025, arXiv 2506.21035 v2).

Ten handwritten digits arrive as five tasks of two classes. The backbone (two layers of 64, pretrained on 60 labelled images,
frozen) reads features against fixed anchors of the ten classes, as CLIP does against its text embeddings, so that only adapters
differ. Every task trains 4 new ranks a layer with its own two labels; tests ask for one of ten labels and name no task.

The rivals have the same 4 ranks a task, freeze them too, and get their router on top. Their router's rows for old experts are
frozen as well, which forgets less than training them on. Learning rates (0.001 to 0.03) and the temperature were chosen on other
seeds; 0.003 is where the final accuracy of either method is best or within the noise of it, and where both learn a task equally.
The router's softmax has temperature 1. All adapters together add a point or two to what the backbone gets alone (recorded),
so differences between methods are small here.
"""

import functools
import math

import torch
import torch.nn.functional as F

from paperclaims.fixtures.data.tabular import digits
from paperclaims.fixtures.measurement import count_flops, fake_mode
from paperclaims.fixtures.protocol import claim, inconclusive, not_reproduced
from paperclaims.fixtures.statistics import paired_difference
from paperclaims.impl.merging.mora_rank_moe import mixture_of_ranks, self_activated_gates

SEEDS, TASKS, RANK, WIDTH, TRAIN, PRETRAIN = 24, 5, 4, 64, 1197, 60
TEMPERATURE, LEARNING_RATE, STEPS, BATCH = 0.2, 3e-3, 60, 32
DIFFERS = "two-class digit tasks on a small MLP for CLIP and language models, 4 ranks a task"


class Ranks:
    """A pool of rank-1 experts in two layers for a stack of seeds; `gates` says how much of each an input gets."""

    routed = 0

    def __init__(self, budget=RANK, scrambled=False):
        self.budget, self.scrambled, self.tasks = budget, scrambled, [[], []]

    def add(self, generator, seeds):
        """New experts for the next task in both layers: the parameters to train."""
        new = []
        for layer in self.tasks:
            uniform = torch.rand(seeds, RANK + self.routed, WIDTH, generator=generator)
            key, router = ((2 * uniform - 1) / WIDTH**0.5).split([RANK, self.routed], dim=1)
            layer.append([part.clone().requires_grad_() for part in (key, torch.zeros(seeds, WIDTH, RANK), router)])
            new += layer[-1]
        return new

    def pool(self, layer):
        keys, values, router = zip(*self.tasks[layer], strict=True)
        return torch.cat(keys, 1), torch.cat(values, 2), torch.cat(router, 1)

    def gates(self, layer, x):
        activations = x @ self.pool(layer)[0].mT
        if self.scrambled:
            order = torch.randperm(activations.shape[-1], generator=torch.Generator().manual_seed(activations.shape[-1]))
            activations = activations[..., order]
        return self_activated_gates(activations, temperature=TEMPERATURE, budget=self.budget)

    def __call__(self, layer, x):
        keys, values, _ = self.pool(layer)
        return (self.gates(layer, x) * (x @ keys.mT)) @ values.mT

    def active(self, layer, x):
        """Parameters of the experts with a gate, for one input on average."""
        return 2 * WIDTH * (self.gates(layer, x) > 0).sum(-1).double().mean().item()


class RoutedRanks(Ranks):
    """The same experts under a learned router: one row of it for each rank, softmax over all, the best `budget` stay."""

    routed = RANK

    def gates(self, layer, x):
        gates = torch.softmax(x @ self.pool(layer)[2].mT, dim=-1)
        budget = min(self.budget * self.routed // RANK, gates.shape[-1])
        best = gates.topk(budget, dim=-1)
        return torch.zeros_like(gates).scatter(-1, best.indices, best.values).repeat_interleave(RANK // self.routed, -1)


class RoutedAdapters(RoutedRanks):
    """LoRA-MoE: one row of the router for each task's whole adapter; the best one is active."""

    routed = 1


def features(x, backbone, adapters=None):
    for layer, (weight, bias) in enumerate(backbone):
        y = x @ weight + bias
        if adapters is not None:
            y = y + adapters(layer, x)
        x = y.relu() if layer == 0 else y
    return F.normalize(x, dim=-1)


@functools.cache
def problem(seeds):
    """Images and labels in an order of every seed's own, each label's task, class anchors, and the pretrained backbone."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(function, *arguments):
        return torch.stack([function(*arguments, generator=generator) for generator in generators])

    table = digits()
    order = draw(torch.randperm, len(table.y))
    x, y = torch.tensor(table.x, dtype=torch.float32)[order] / 16, torch.tensor(table.y)[order]
    anchors = 10 * torch.linalg.qr(draw(torch.randn, (WIDTH, 10)))[0]
    backbone = [((draw(torch.randn, (WIDTH, WIDTH)) * (2 / WIDTH) ** 0.5), torch.zeros(len(seeds), 1, WIDTH)) for _ in range(2)]
    parameters = [part.requires_grad_() for layer in backbone for part in layer]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(100):
        loss = F.cross_entropy((features(x[:, :PRETRAIN], backbone) @ anchors).flatten(0, 1), y[:, :PRETRAIN].flatten())
        optimizer.zero_grad()
        (loss * len(seeds)).backward()
        optimizer.step()
    for part in parameters:
        part.requires_grad_(False)
    task = draw(torch.randperm, 10) // 2
    return x[:, PRETRAIN:], y[:, PRETRAIN:], task, anchors, backbone


@functools.cache
def learn(method, seeds, **options):
    """One pass over the tasks: accuracies (seeds, after task, of task), log drift (seeds,), active parameters a layer."""
    x, y, task, anchors, backbone = problem(seeds)
    generator = torch.Generator().manual_seed(seeds[0])
    adapters, of_row = method(**options), task.gather(1, y)
    (x_train, x_test), (y_train, y_test) = ((part[:, :TRAIN], part[:, TRAIN:]) for part in (x, y))
    accuracies, first = [], []
    for t in range(TASKS):
        optimizer = torch.optim.Adam(adapters.add(generator, len(seeds)), lr=LEARNING_RATE)
        here = (of_row[:, :TRAIN] == t).float()
        for _ in range(STEPS):
            rows = torch.multinomial(here, BATCH, generator=generator)
            logits = features(x_train.gather(1, rows.unsqueeze(-1).expand(-1, -1, WIDTH)), backbone, adapters) @ anchors
            logits = logits.masked_fill((task != t).unsqueeze(1), -math.inf)
            loss = F.cross_entropy(logits.flatten(0, 1), y_train.gather(1, rows).flatten()) * len(seeds)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.requires_grad_(False)
        right = ((features(x_test, backbone, adapters) @ anchors).argmax(-1) == y_test).float()
        member = F.one_hot(of_row[:, TRAIN:], TASKS).float()
        accuracies.append(100 * torch.einsum("sn,snt->st", right, member) / member.sum(1))
        first.append(features(x_train, backbone, adapters))
    inputs = (of_row[:, :TRAIN] == 0).unsqueeze(-1)
    moved, learned = (
        ((a - b).square() * inputs).sum((1, 2)) for a, b in ((first[-1], first[0]), (first[0], features(x_train, backbone)))
    )
    return torch.stack(accuracies, 1).numpy(), (moved / learned).log().numpy(), adapters.active(0, x_test)


def final(accuracies):
    """Mean accuracy over all tasks after the last one, shape (seeds,)."""
    return accuracies[:, -1].mean(-1)


def forgetting(accuracies):
    """Best minus final accuracy, mean over all tasks but the last, shape (seeds,)."""
    return (accuracies.max(1) - accuracies[:, -1])[:, :-1].mean(-1)


def without_adapters(seeds):
    """Accuracy of the backbone alone on the test images, mean over seeds."""
    x, y, _, anchors, backbone = problem(seeds)
    return 100 * ((features(x[:, TRAIN:], backbone) @ anchors).argmax(-1) == y[:, TRAIN:]).float().mean()


@inconclusive(
    "ahead by something like a point, which 24 seeds cannot tell from less than a point; the bar of a point is this suite's, and "
    "all adapters together add little more than that to the backbone"
)
@claim(
    "With as many active ranks, rank-1 experts that activate themselves end up more accurate and forget less than LoRA adapters "
    "behind a router: by a point at least.",
    scale="reduced",
    differs=DIFFERS,
    control="activations shuffled over the experts, anew when the pool grows, before they gate: same budget, no self-activation",
    control_breaks=("gain in final accuracy", "forgetting avoided"),
    paper_value="lower forgetting than adapter-level LoRA-MoE (abstract)",
)
def test_less_forgetting_than_adapters_behind_a_router(arm, seeds, evidence):
    seeds = tuple(seeds(SEEDS))
    ours, _, _ = learn(Ranks, seeds, scrambled=arm.control)
    rival, _, _ = learn(RoutedAdapters, seeds)
    evidence.record("accuracy of the backbone alone", without_adapters(seeds), unit="%")
    for name, accuracies in (("ranks", ours), ("adapters behind a router", rival)):
        evidence.record(f"final accuracy, {name}", final(accuracies).mean(), unit="%")
        evidence.record(f"forgetting, {name}", forgetting(accuracies).mean(), unit="points")
        seen = [accuracies[:, t, : t + 1].mean() for t in range(TASKS)]
        evidence.curve("accuracy on the tasks so far", range(1, TASKS + 1), seen, series=name, x_label="tasks", y_label="%")
    evidence.require("gain in final accuracy", paired_difference(final(ours), final(rival)), above=1.0, unit="points")
    avoided = paired_difference(forgetting(rival), forgetting(ours))
    evidence.require("forgetting avoided", avoided, above=1.0, unit="points")


@not_reproduced(
    "did not hold here: self-activation moves the first task's features somewhat less, not half as far; the factor is "
    "this suite's (the paper gives none), and the rival has rank-1 experts and frozen rows for old ones, not whole adapters"
)
@claim(
    "Self-activation keeps what was learned in place where routing degrades: on the first task's inputs, later tasks move the "
    "features at most half as far (squared, against what the first task taught) as with a router over the same rank-1 experts.",
    scale="reduced",
    differs=f"{DIFFERS}; the router's rows for old experts are frozen",
    control="the rank-1 experts are gated by the router instead",
    central=False,
    paper_value="no number: earlier tasks' routing degrades as experts accumulate (abstract)",
)
def test_self_activation_drifts_less_than_a_router(arm, seeds, evidence):
    seeds = tuple(seeds(SEEDS))
    _, ours, _ = learn(RoutedRanks if arm.control else Ranks, seeds)
    _, rival, _ = learn(RoutedRanks, seeds)
    evidence.record("drift, self-activated", math.exp(ours.mean()))
    evidence.record("drift, router", math.exp(rival.mean()))
    evidence.require("log of the ratio of drifts", paired_difference(ours, rival), below=math.log(0.5))


@claim(
    "Half the active adapter parameters of LoRA adapters behind a router are enough: the final accuracy stays within 2 points.",
    scale="reduced",
    differs=f"{DIFFERS}; counted are experts with a gate, not the keys and the router read to choose them; the backbone alone is "
    "within the margin as well",
    central=False,
    control="no activation budget: every rank is active for every input",
    control_breaks="active parameters over the rival's",
    paper_value="fewer active parameters (abstract)",
)
def test_fewer_active_parameters(arm, seeds, evidence):
    seeds = tuple(seeds(SEEDS))
    ours, _, active = learn(Ranks, seeds, budget=RANK * TASKS if arm.control else RANK // 2)
    rival, _, active_rival = learn(RoutedAdapters, seeds)
    evidence.record("accuracy of the backbone alone", without_adapters(seeds), unit="%")
    evidence.record("active adapter parameters a layer, ranks", active)
    evidence.record("active adapter parameters a layer, adapters behind a router", active_rival)
    evidence.require("active parameters over the rival's", active / active_rival, below=0.5)
    evidence.require("gain in final accuracy", paired_difference(final(ours), final(rival)), above=-2.0, unit="points")


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
