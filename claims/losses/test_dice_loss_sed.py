"""Improving Polyphonic Sound Event Detection on Multichannel Recordings with the Sørensen-Dice Coefficient Loss and Transfer
Learning (Watcharasupat, Nguyen, Nguyen, Lee, Jones, Gan, 2021).

Every seed draws eight kinds of sound (tones, chirps and noises over 16 bands) and scenes of frames of 0.1 s, in which events of
each kind come and go on their own, from all directions, from 5 dB below the background to 15 dB above it. Four microphones are
heard as they are (MIC), or as an omnidirectional signal with the flow of its energy along three axes (FOA). A network with 32
hidden units sees a frame and the means of the five before and the five after it. Scores are over segments of a second, as in the
DCASE challenges. Learning rates were chosen on other seeds, from 0.001, 0.003, 0.005, 0.01, 0.02, 0.03 and 0.06: for Dice 0.01 is
best in both scores, for cross-entropy 0.02 in F1 and 0.01 in error rate.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from paperclaims.fixtures.models.classifiers import Draws, classify, train_classifiers
from paperclaims.fixtures.protocol import claim, inconclusive
from paperclaims.fixtures.statistics import mean_interval
from paperclaims.impl.losses.dice_loss_sed import dice_loss, error_rate, f1_score

KINDS, BANDS, SECOND = 8, 16, 10
TRAIN, VALIDATE, TEST = 8000, 2000, 4000
SEEDS, STEPS, BATCH = 12, 200, 256
RARE, EVEN = 0.03, 0.5
FORMATS = ("FOA", "MIC")
DIFFERS = "made-up scenes and a small network for recordings and a deep one; no augmentation, no transfer"


def cross_entropy(logits, targets, weight=1.0):
    weight = torch.tensor(weight)
    return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none").mean((-2, -1))


# Loss and learning rate
LOSSES = {
    "Dice": (functools.partial(dice_loss, dim=(-2, -1)), 0.01),
    "cross-entropy for F1": (cross_entropy, 0.02),
    "cross-entropy for error rate": (cross_entropy, 0.01),
}


@functools.cache
def scenes(seeds, rate, format, frames=TRAIN + VALIDATE + TEST):
    """Features (seeds, frames, 192) and which kinds sound, bool (seeds, frames, kinds), each a share `rate` of the time."""
    draws = Draws(seeds)
    events = 1 + frames // 5
    lasting = draws(torch.randint, 5, 21, (KINDS, events))
    pauses = -draws(torch.rand, KINDS, events).clamp(min=1e-6).log() * 12.5 * (1 / rate - 1)
    ends = (lasting + pauses.long()).cumsum(-1)
    now = torch.arange(frames).expand(len(seeds), KINDS, -1).contiguous()
    event = torch.searchsorted(ends, now, right=True)
    progress = 1 - (ends.gather(-1, event) - now) / lasting.gather(-1, event)
    active = progress >= 0

    level = 10 ** (-0.5 + 2 * draws(torch.rand, KINDS, events)).gather(-1, event) * active
    direction = F.normalize(draws(torch.randn, KINDS, events, 3), dim=-1)
    direction = direction.gather(2, event.unsqueeze(-1).expand(-1, -1, -1, 3))
    first, last = (BANDS * draws(torch.rand, KINDS, 1) for _ in range(2))
    chirps = torch.arange(KINDS).unsqueeze(-1) % 3 == 1
    centre = first + (last - first) * progress.clamp(min=0) * chirps
    width = torch.tensor([0.8, 1.0, 4.0])[torch.arange(KINDS) % 3].view(KINDS, 1, 1)
    energy = level.unsqueeze(-1) * torch.exp(-(((torch.arange(BANDS) - centre.unsqueeze(-1)) / width) ** 2) / 2)

    noise = draws(torch.randn, frames, 4, BANDS)
    if format == "MIC":
        facing = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5
        heard = torch.einsum("skfb,skfm->sfmb", energy, ((1 + direction @ facing.T) / 2) ** 2)
        x = (1 + heard).log() + 0.4 * noise
    else:
        flow = torch.einsum("skfb,skfm->sfmb", energy, direction)
        total = 1 + energy.sum(1).unsqueeze(2)
        x = torch.cat([total.log() + 0.4 * noise[:, :, :1], flow / total + 0.2 * noise[:, :, 1:]], 2)
    x = x.flatten(2)
    used = x[:, :TRAIN]
    x = (x - used.mean(1, keepdim=True)) / used.std(1, keepdim=True)
    near = F.avg_pool1d(F.pad(x.mT, (5, 5)), 5, 1).mT
    return torch.cat([near[:, :frames], x, near[:, 6:]], -1), active.mT


def network(seeds, rate, format, losses, steps=STEPS, frames=TRAIN + VALIDATE + TEST):
    """Layers of networks trained by each of the losses, given with their learning rates."""
    x, active = scenes(seeds, rate, format, frames)
    known = active[:, :TRAIN].float()

    def loss(layers, points, rows):
        logits = classify(layers, points)
        y = known.gather(1, rows.squeeze(1).unsqueeze(-1).expand(-1, -1, KINDS))
        return torch.stack([form(z, y) for z, (form, _) in zip(logits.unbind(1), losses, strict=True)], 1)

    settings = {"hidden": (32,), "classes": KINDS, "steps": steps, "batch": BATCH, "settings": len(losses)}
    rates = torch.tensor([rate for _, rate in losses])
    return train_classifiers(x[:, :TRAIN], torch.arange(known.shape[1]), seeds, loss, lr=rates, **settings)


@functools.cache
def scores(seeds, rate, format):
    """F1 and error rate of scenes not trained on, in per cent, {loss: ((seeds,), (seeds,))}, at p = 0.5.

    And F1 of cross-entropy at the probability, of 15, that gives the highest F1 on yet other scenes.
    """
    x, active = scenes(seeds, rate, format)
    logits = classify(network(seeds, rate, format, list(LOSSES.values())), x[:, TRAIN:].unsqueeze(1))
    true, held_out = active[:, TRAIN:], slice(VALIDATE)
    found = {}
    for z, name in zip(logits.unbind(1), LOSSES, strict=True):
        calls = (z > 0)[:, VALIDATE:], true[:, VALIDATE:]
        found[name] = tuple(100 * score(*calls, SECOND).numpy() for score in (f1_score, error_rate))
    z = logits[:, list(LOSSES).index("cross-entropy for F1")]
    candidates = torch.linspace(0.05, 0.75, 15).logit()
    validated = torch.stack([f1_score((z > place)[:, held_out], true[:, held_out], SECOND) for place in candidates])
    place = candidates[validated.argmax(0)].view(-1, 1, 1)
    found["tuned threshold"] = (100 * f1_score((z > place)[:, VALIDATE:], true[:, VALIDATE:], SECOND).numpy(),)
    return found


CONTROL = "every kind sounds half of the time: silent cells no longer dominate"


@inconclusive(
    "with cross-entropy's learning rate tuned as well the gain lies between -1.1 and 0.8 points from one run of 12 seeds to the "
    "next, each with an interval of two points either way; at rates too low for cross-entropy it is three to five points"
)
@claim(
    "Trained by Dice loss, a detector has a higher F1 than trained by cross-entropy, by a point on average over both recording "
    "formats.",
    scale="reduced",
    differs=DIFFERS,
    control=CONTROL,
    paper_value="consistently higher F1 than with cross-entropy across settings and formats (abstract)",
)
def test_f1(arm, seeds, evidence):
    seeds, rate = tuple(seeds(SEEDS)), EVEN if arm.control else RARE
    gains = []
    for format in FORMATS:
        found = scores(seeds, rate, format)
        ours, baseline, tuned = (found[name][0] for name in ("Dice", "cross-entropy for F1", "tuned threshold"))
        gains.append(ours - baseline)
        evidence.record(f"F1 with cross-entropy, {format}", baseline.mean(), "%")
        evidence.record(f"gain in F1, {format}", mean_interval(ours - baseline), "points")
        evidence.record(f"the same over cross-entropy with a tuned threshold, {format}", mean_interval(ours - tuned), "points")
    evidence.require("gain in F1", mean_interval(np.mean(gains, 0)), above=1, unit="points")


@inconclusive(
    "the error rate saved lies between -1.4 and 3 points from one run of 12 seeds to the next, each with an interval of three"
)
@claim(
    "Trained by Dice loss, a detector has a lower error rate than trained by cross-entropy, by a point on average over both "
    "recording formats.",
    scale="reduced",
    differs=DIFFERS,
    control=CONTROL,
    paper_value="consistently lower error rate than with cross-entropy across settings and formats (abstract)",
)
def test_error_rate(arm, seeds, evidence):
    seeds, rate = tuple(seeds(SEEDS)), EVEN if arm.control else RARE
    saved = []
    for format in FORMATS:
        found = scores(seeds, rate, format)
        ours, baseline = (found[name][1] for name in ("Dice", "cross-entropy for error rate"))
        saved.append(baseline - ours)
        evidence.record(f"error rate with cross-entropy, {format}", baseline.mean(), "%")
        evidence.record(f"error rate saved, {format}", mean_interval(baseline - ours), "points")
    evidence.require("error rate saved", mean_interval(np.mean(saved, 0)), above=1, unit="points")


def silent_share(layers, seeds, rate, loss, frames):
    """Per cent of the L1 norm of a loss's gradient by the logits that silent cells have, (seeds,)."""
    x, active = scenes(seeds, rate, "MIC", frames)
    logits = classify(layers, x.unsqueeze(1))[:, 0].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, active.float()).sum(), logits)
    size = gradient.abs()
    return (100 * (size * ~active).sum((-2, -1)) / size.sum((-2, -1))).numpy()


@claim(
    "At the start, with every kind active 1 % of the time, updates from silent cells are over 95 % of cross-entropy's gradient, "
    "but less than three quarters of the Dice loss's: nearer to half than to all. After training the shares are "
    "alike (recorded).",
    scale="mechanism",
    differs="a small network on made-up scenes; the paper argues it",
    control="cross-entropy in its place",
    control_breaks="share of the gradient from silent cells",
    central=False,
    paper_value="conventional training is overwhelmed by updates from negative samples (abstract)",
)
def test_silent_cells_do_not_overwhelm(arm, seeds, evidence):
    seeds, frames = tuple(seeds(SEEDS)), 1000
    name = "cross-entropy for F1" if arm.control else "Dice"
    rates = [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5]

    def share(loss, rate, steps=0):
        layers = network(seeds, rate, "MIC", [loss], steps, frames)
        return silent_share(layers, seeds, rate, loss[0], frames)

    shares = [share(LOSSES[name], rate) for rate in rates]
    evidence.curve("share of the gradient", rates, np.mean(shares, 1), series=name, x_label="share of active cells", log="x")
    evidence.require("share of the gradient from silent cells", mean_interval(shares[0]), below=75, unit="%")
    plain, weighted = LOSSES["cross-entropy for F1"], functools.partial(cross_entropy, weight=99.0)
    evidence.require("the same under cross-entropy", mean_interval(share(plain, rates[0])), above=95, unit="%")
    evidence.record("the same with active cells weighted up 99 times", share((weighted, 0.01), rates[0]).mean(), "%")
    evidence.record("share after training", mean_interval(share(LOSSES[name], rates[0], STEPS)), "%")
