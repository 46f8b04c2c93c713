"""REFT: Reliable and Efficient In-Memory Fault Tolerance of Large Language Model Pretraining (Wang et al., 2023).

arXiv 2310.12670, first version. Nodes are processes of this machine: a snapshot management process (SMP) with shared memory, and
a trainer. Losing a node kills its SMP by SIGKILL and takes its memory away.
"""

import contextlib
import hashlib
import inspect
import json
import os
import runpy
import select
import subprocess
import sys
import time
from itertools import combinations
from math import sqrt

import numpy as np
import pytest
import torch

from paperclaims.fixtures.data.tabular import digits
from paperclaims.fixtures.measurement import interleaved
from paperclaims.fixtures.protocol import claim
from paperclaims.fixtures.statistics import Interval, exponent_interval, proportion_interval
from paperclaims.impl.distributed import reft_inmemory_ckpt as reft

ONE_MACHINE = "nodes are processes of one machine, their network its memory"
TIMEOUT = 120.0


# A killed trainer -------------------------------------------------------------------------------------------------------------


def train_step(state, data, labels):
    """Softmax regression by Adam on a random batch; key and counter of the generator are part of the state."""
    generator = np.random.Generator(np.random.Philox(key=state["rng"][0], counter=[0, 0, 0, state["rng"][1]]))
    state["rng"][1] += np.uint64(1)
    batch = generator.choice(len(data), 32, replace=False)
    scores = data[batch] @ state["weight"]
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    chances[np.arange(32), labels[batch]] -= 1
    gradient = data[batch].T @ chances / 32
    state["step"] += 1
    state["mean"] += 0.1 * (gradient - state["mean"])
    state["square"] += 0.001 * (gradient**2 - state["square"])
    mean, square = state["mean"] / (1 - 0.9 ** state["step"]), state["square"] / (1 - 0.999 ** state["step"])
    state["weight"] -= 0.01 * mean / (np.sqrt(square) + 1e-8)


def trainer(library, options):
    """The program of one data-parallel rank: a step and a snapshot for each line of input, at the end the digest of the state."""
    options, reft = json.loads(options), runpy.run_path(library)
    paths, rank = options["paths"], options["rank"]
    memory = reft["NodeMemory"](paths[rank])
    if options["private"]:
        memory = reft["NodeMemory"](f"{paths[rank]}-own", create=(memory.nodes, memory.parity, memory.block))
        memory.path.unlink()
    with np.load(options["data"]) as file:
        data, labels = file["data"], file["labels"]
    state = {name: np.zeros((data.shape[1], 10)) for name in ("weight", "mean", "square")}
    state |= {"step": np.zeros((), dtype=np.int64), "rng": np.array([options["seed"], 0], dtype=np.uint64)}
    if options["resume"] >= 0:
        sizes = [tensor.nbytes for tensor in state.values()]
        lengths = [sum(stop - start for _, start, stop in reft["shard_pieces"](sizes, len(paths), r)) for r in range(len(paths))]
        shards = [reft["NodeMemory"](path).shard(options["resume"]) for path in paths]
        reft["load_state"]([shard[:length] for shard, length in zip(shards, lengths, strict=True)], state)
    print(json.dumps(int(state["step"])), flush=True)
    for _ in iter(sys.stdin.readline, "stop\n"):
        train_step(state, data, labels)
        memory.save(int(state["step"]), state, len(paths), rank)
        print(json.dumps(int(state["step"])), flush=True)
    print(json.dumps(hashlib.sha256(b"".join(tensor.tobytes() for tensor in state.values())).hexdigest()), flush=True)


class Trainers:
    """All ranks, each a process; a line to every one of them stands for the all-reduce of a step."""

    def __init__(self, cluster, **options):
        program = "import hashlib, json, runpy, sys\nimport numpy as np\n"
        program += inspect.getsource(train_step) + inspect.getsource(trainer) + "trainer(*sys.argv[1:])\n"
        command = [sys.executable, "-P", "-c", program, reft.__file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self.processes = []
        for rank in range(cluster.nodes):
            told = json.dumps({"paths": cluster.paths, "rank": rank, **options})
            self.processes.append(subprocess.Popen([*command, told], **pipes))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def tell(self, line):
        for process in self.processes:
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def hear(self):
        """What all ranks say, which has to be the same."""
        heard = set()
        for process in self.processes:
            assert select.select([process.stdout], [], [], TIMEOUT)[0], "a trainer does not answer"
            heard.add(json.loads(process.stdout.readline() or '"a trainer is gone"'))
        (word,) = heard
        return word

    def train(self, steps):
        for _ in range(steps):
            self.tell("step")
            self.hear()

    def finish(self):
        self.tell("stop")
        return self.hear()

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@claim(
    "SMPs keep the snapshots when all trainers are killed in the middle of a step: training goes on from at most one step "
    "before, and ends in the same bits.",
    scale="reduced",
    differs=f"softmax regression by Adam on 8 x 8 digits, three ranks; {ONE_MACHINE}",
    control="the trainer keeps its snapshot in memory of its own",
    control_breaks="steps lost",
    paper_value="parameters survive software failures (snapshot management processes)",
)
def test_snapshots_outlive_killed_trainers(arm, rng, tmp_path, evidence):
    total, killed_after, delay = 40, int(rng.integers(15, 25)), rng.uniform(0, 2e-3)
    np.savez(tmp_path / "digits.npz", data=digits().x / 16, labels=digits().y)
    options = {"data": str(tmp_path / "digits.npz"), "seed": int(rng.integers(2**32))}
    with reft.Cluster(3, shard_bytes=8192) as cluster:
        with Trainers(cluster, **options, private=True, resume=-1) as trainers:
            trainers.hear()
            trainers.train(total)
            undisturbed = trainers.finish()
        with Trainers(cluster, **options, private=arm.control, resume=-1) as trainers:
            trainers.hear()
            trainers.train(killed_after)
            trainers.tell("step")
            time.sleep(delay)
            trainers.kill()
        found = cluster.complete_step()
        with Trainers(cluster, **options, private=arm.control, resume=found) as trainers:
            resumed = trainers.hear()
            trainers.train(total - resumed)
            evidence.require("same bits as without the failure", trainers.finish() == undisturbed, above=1)
    evidence.record("killed after step", killed_after)
    evidence.require("steps lost", killed_after + 1 - resumed, below=1)


# Lost nodes -------------------------------------------------------------------------------------------------------------------


def mixed_state(rng):
    """Tensors of odd shapes and several types."""
    return {
        "weight": torch.from_numpy(rng.standard_normal((129, 257))).float(),
        "half": torch.from_numpy(rng.standard_normal((31, 7))).bfloat16(),
        "quantised": torch.from_numpy(rng.integers(-128, 128, 1021, dtype=np.int8)),
        "step": torch.tensor(int(rng.integers(1 << 40))),
    }


def same_bits(state, other):
    return all(
        torch.equal(state[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)) for name in state
    )


def shard_lengths(state, ranks):
    sizes = [tensor.nbytes for tensor in state.values()]
    return [sum(stop - start for _, start, stop in reft.shard_pieces(sizes, ranks, rank)) for rank in range(ranks)]


def recovered_by_processes(state, nodes, parity, losses, rotated=True):
    """Of all ways to lose `losses` nodes at once, the share after which the state comes back in the same bits."""
    lengths, outcomes = shard_lengths(state, nodes), []
    with reft.Cluster(nodes, max(lengths), parity, rotated) as cluster:
        for step, lost in enumerate(combinations(range(nodes), losses)):
            for rank in range(nodes):
                cluster.memory(rank).save(step, state, nodes, rank)
            cluster.encode(step)
            cluster.lose(*lost)
            try:
                cluster.rebuild(step)
            except reft.UnrecoverableError:
                outcomes.append(False)
                continue
            restored = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            reft.load_state(cluster.shards(step, lengths), restored)
            outcomes.append(same_bits(state, restored))
    return np.mean(outcomes)


def encoded_group(rng, nodes, parity, rotated=True):
    layout = reft.stripes(nodes, parity, rotated)
    images = rng.integers(0, 256, (nodes, nodes, 40), dtype=np.uint8)
    for node in range(nodes):
        reft.encode_node(images, node, layout, parity)
    return images, layout


def rebuilt(images, layout, parity, lost):
    """What comes back after losing these nodes: the "same" bits, "other" ones, or none, which is "reported"."""
    left = [None if node in lost else image for node, image in enumerate(images)]
    try:
        for node in lost:
            out = np.zeros_like(images[0])
            reft.rebuild_node(left, node, out, layout, parity)
            if not np.array_equal(out, images[node]):
                return "other"
    except reft.UnrecoverableError:
        return "reported"
    return "same"


def outcomes(rng, sizes, parity, losses, rotated=True):
    found = []
    for nodes in sizes:
        images, layout = encoded_group(rng, nodes, parity, rotated)
        found += [rebuilt(images, layout, parity, lost) for lost in combinations(range(nodes), losses)]
    return np.array(found)


@claim(
    "RAIM5: XOR parity rotated over a sharding group gives back every bit after the loss of any one node, "
    "and a loss of two is reported, never papered over.",
    scale="paper",
    control="parity is kept on the node whose blocks it protects instead of another one",
    control_breaks=("losses of one of 4 processes recovered", "losses of one node recovered, groups of 3 to 8"),
    paper_value="any single node of a sharding group can be lost",
)
def test_any_one_node_comes_back(arm, rng, evidence):
    rotated = not arm.control
    evidence.require(
        "losses of one of 4 processes recovered", recovered_by_processes(mixed_state(rng), 4, 1, 1, rotated), above=1
    )
    single, double = (outcomes(rng, range(3, 9), 1, losses, rotated) for losses in (1, 2))
    evidence.require("losses of one node recovered, groups of 3 to 8", np.mean(single == "same"), above=1)
    evidence.require("losses of two nodes reported, groups of 3 to 8", np.mean(double == "reported"), above=1)


@claim(
    "With a second, Reed-Solomon parity any two nodes of a sharding group come back, and with a third any three.",
    scale="reduced",
    differs="the paper has one parity; more of them are ours",
    control="one parity less: XOR alone, or two where three nodes go",
    control_breaks=("losses of two of 4 processes recovered", "losses of two and three nodes recovered, groups of 4 to 8"),
    central=False,
    paper_value="erasure coding against node failures",
)
def test_any_two_nodes_come_back_with_reed_solomon(arm, rng, evidence):
    less = int(arm.control)
    state = mixed_state(rng)
    evidence.require("losses of two of 4 processes recovered", recovered_by_processes(state, 4, 2 - less, 2), above=1)
    found = np.concatenate([outcomes(rng, range(4, 9), losses - less, losses) for losses in (2, 3)])
    evidence.require("losses of two and three nodes recovered, groups of 4 to 8", np.mean(found == "same"), above=1)
    evidence.require("losses answered with other bits", np.mean(found == "other"), below=0)


# Cost -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.serial
@claim(
    "A snapshot, 1/m of the state copied into shared memory and its parity, takes less than 1/m of the time of a checkpoint on "
    "disk.",
    scale="reduced",
    differs=f"32 MiB and m = 4 without GPUs; {ONE_MACHINE}; against torch.save with fsync, not an asynchronous checkpoint",
    control="the full state goes to the disk, as in the baseline: neither sharded nor in memory",
    paper_value="over 14 times faster than asynchronous checkpointing",
)
def test_snapshots_are_faster_than_checkpoints(arm, rng, tmp_path, evidence):
    ranks, rounds = 4, 15
    state = {f"layer {i}": torch.from_numpy(rng.standard_normal((2, 1 << 20), dtype=np.float32)) for i in range(4)}
    layout = reft.stripes(ranks)
    with reft.Cluster(ranks, max(shard_lengths(state, ranks))) as cluster:
        memories = [cluster.memory(rank) for rank in range(ranks)]
        for rank, memory in enumerate(memories):
            memory.save(0, state, ranks, rank)
            memory.save(1, state, ranks, rank)

        def shard():
            memories[0].save(1, state, ranks, 0)

        def snapshot():
            shard()
            memories[0].encode(1, 0, memories, layout)

        def checkpoint():
            with open(tmp_path / "checkpoint.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())

        timed = {
            "method": checkpoint if arm.control else snapshot,
            "checkpoint": checkpoint,
            "shard without parity": shard,
        }
        timings = interleaved(timed, rounds=rounds, rng=rng)
    evidence.require("time of a checkpoint over that of the method", timings.ratio("checkpoint", "method"), above=ranks, unit="x")
    for name in timed:
        evidence.record(name, 1e3 * timings.median(name).estimate, "ms")


@pytest.mark.serial
@claim(
    "Sharding counts on the same medium: a rank's snapshot, parity included, takes less time than a copy of the full state into "
    "memory, which is what an asynchronous checkpoint makes training wait for.",
    scale="reduced",
    differs=f"32 MiB and m = 4 without GPUs; {ONE_MACHINE}",
    control="sharding off: each rank copies the full state, and the parity covers it",
    paper_value="over 14 times faster than asynchronous checkpointing",
)
def test_sharded_snapshots_are_faster_than_full_copies(arm, rng, evidence):
    nodes, rounds = 4, 81
    ranks = 1 if arm.control else nodes
    state = {f"layer {i}": torch.from_numpy(rng.standard_normal((2, 1 << 20), dtype=np.float32)) for i in range(4)}
    layout = reft.stripes(nodes)
    with reft.Cluster(nodes, max(shard_lengths(state, ranks))) as cluster:
        memories = [cluster.memory(node) for node in range(nodes)]
        for node, memory in enumerate(memories):
            memory.save(0, state, ranks, node % ranks)
        whole = np.zeros(sum(tensor.nbytes for tensor in state.values()), dtype=np.uint8)

        def snapshot():
            memories[0].save(0, state, ranks, 0)
            memories[0].encode(0, 0, memories, layout)

        timed = {"snapshot": snapshot, "full copy": lambda: reft.copy_shard(state, 1, 0, whole)}
        timings = interleaved(timed, rounds=rounds, rng=rng)
    evidence.require("time of a full copy over that of a snapshot", timings.ratio("full copy", "snapshot"), above=1, unit="x")
    for name in timed:
        evidence.record(name, 1e3 * timings.median(name).estimate, "ms")


def stage_on_meta(hidden, layers, vocabulary, tensor, pipeline):
    """Training state of the first pipeline stage of a decoder: fp16 weights, fp32 master weights and Adam's two moments."""
    shapes = {"embedding": (vocabulary // tensor, hidden)}
    for layer in range(layers // pipeline):
        shapes |= {f"{layer}.attention in": (3 * hidden // tensor, hidden), f"{layer}.attention out": (hidden, hidden // tensor)}
        shapes |= {f"{layer}.mlp in": (4 * hidden // tensor, hidden), f"{layer}.mlp out": (hidden, 4 * hidden // tensor)}
        shapes |= {f"{layer}.norms": (4, hidden)}
    parts = {"weight": torch.float16, "master": torch.float32, "mean": torch.float32, "square": torch.float32}
    return {
        f"{name} {part}": torch.empty(shape, dtype=dtype, device="meta")
        for name, shape in shapes.items()
        for part, dtype in parts.items()
    }


@claim(
    "Sharding the snapshot over m data-parallel ranks leaves each rank 1/m of its stage's bytes to copy, together one full copy.",
    scale="reduced",
    differs="layouts of 24 devices chosen here for OPT's published shapes; those of the paper were not at hand",
    control="sharding off: every data-parallel rank copies the full state of its stage",
    control_breaks="bytes of the largest shard, times m, over those of the stage",
    paper_value="1/m of the stage",
)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        pytest.param((2048, 24, 50272), (24, 1, 1), id="opt-1.3b, DP 24"),
        pytest.param((2560, 32, 50272), (6, 4, 1), id="opt-2.7b, DP 6 TP 4"),
        pytest.param((4096, 32, 50272), (3, 4, 2), id="opt-6.7b, DP 3 TP 4 PP 2"),
    ],
)
def test_each_rank_copies_its_share(arm, shape, layout, evidence):
    data, tensor, pipeline = layout
    state = stage_on_meta(*shape, tensor, pipeline)
    sizes = [entry.nbytes for entry in state.values()]
    ranks = 1 if arm.control else data
    pieces = [piece for rank in range(ranks) for piece in reft.shard_pieces(sizes, ranks, rank)]
    largest = max(shard_lengths(state, ranks))
    evidence.require("bytes of the largest shard, times m, over those of the stage", largest * data / sum(sizes), below=1.001)
    covered = sum(stop - start for _, start, stop in pieces)
    evidence.require("bytes of all shards over those of the stage", covered / sum(sizes), between=(1, 1))
    evidence.record("stage", sum(sizes) / 2**30, "GiB")
    evidence.record("each rank", largest / 2**30, "GiB")
    if not arm.control:
        held = data * reft.block_bytes(largest, data, 1)
        evidence.record("held per byte of a shard, parity and padding included", held / largest)


# Survival and frequency -------------------------------------------------------------------------------------------------------


def recoverable(rng, nodes, parity):
    """For each set of lost nodes, as a bit mask, whether real bytes come back."""
    images, layout = encoded_group(rng, nodes, parity)
    lost = [[node for node in range(nodes) if mask >> node & 1] for mask in range(2**nodes)]
    return np.array([rebuilt(images, layout, parity, nodes_lost) == "same" for nodes_lost in lost])


def group_masks(rng, draws, groups, nodes, failure, together):
    """Groups that lose nodes: their draw, and which nodes as a bit mask. Units of `together` neighbours fail as one."""
    units = nodes // together
    places = np.cumsum(rng.geometric(failure, int(draws * groups * units * failure * 1.1))) - 1
    places = places[places < draws * groups * units]
    group, which = np.unique(places // units, return_inverse=True)
    bits = ((1 << together) - 1) << (together * (places % units))
    return group // groups, np.bincount(which, weights=bits).astype(int)


@claim(
    "Parity across nodes makes losing parameters rarer by far: under 5 % of the losses of unprotected in-memory snapshots, "
    "at 64 groups of 6 nodes that fail with probability 0.001, and as often as the binomial formula says.",
    scale="reduced",
    differs="the failure probability is a stand-in, not measured on a cluster",
    control="nodes of a group fail in pairs: failures are no longer independent",
    control_breaks=("losses over the formula", "share of the unprotected losses"),
    paper_value="greatly improves the survival probability",
)
def test_parity_raises_the_survival_probability(arm, rng, evidence):
    nodes, groups, failure, draws = 6, 64, 1e-3, 2_000_000
    table = recoverable(rng, nodes, 1)
    draw, masks = group_masks(rng, draws, groups, nodes, failure, together=2 if arm.control else 1)
    losses, unprotected = np.unique(draw[~table[masks]]).size, np.unique(draw).size
    formula = 1 - reft.survival_probability(nodes, 1, failure, groups)
    measured = proportion_interval(losses, draws)
    relative = Interval(*(value / formula for value in (measured.estimate, measured.low, measured.high)), n=draws)
    evidence.require("losses over the formula", relative, between=(0.85, 1.15))
    evidence.require("share of the unprotected losses", proportion_interval(losses, unprotected), below=0.05)
    copies = np.any([masks >> pair & 3 == 3 for pair in (0, 2, 4)], axis=0)
    schemes = {
        "no protection": (1.0, unprotected),
        "RAIM5": (nodes * reft.block_bytes(1 << 20, nodes, 1) / (1 << 20), losses),
        "copy on one peer": (2.0, np.unique(draw[copies]).size),
    }
    for name, (held, count) in schemes.items():
        evidence.record(f"{name}: bytes held", held, "of the state")
        evidence.record(f"{name}: probability of loss", count / draws)


@claim(
    "For fewer bytes than a copy on a peer (1.5 of the state against 2), two parities in a group of 6 lose parameters more "
    "rarely.",
    scale="reduced",
    differs="the paper has one parity; the comparison with replication at equal failures is ours",
    control="one parity (RAIM5, 1.2 of the state)",
    central=False,
)
def test_two_parities_beat_a_copy_for_fewer_bytes(arm, rng, evidence):
    nodes, groups, failure = 6, 64, 1e-3
    parity = 1 if arm.control else 2
    failures = np.array([mask.bit_count() for mask in range(2**nodes)])
    chances = failure**failures * (1 - failure) ** (nodes - failures)
    lost_group = chances[~recoverable(rng, nodes, parity)].sum()
    lost = -np.expm1(groups * np.log1p(-lost_group))
    copy = 1 - reft.survival_probability(2, 1, failure, groups * nodes // 2)
    evidence.record("probability of loss", lost)
    evidence.record("bytes held", nodes * reft.block_bytes(1 << 20, nodes, parity) / (1 << 20), "of the state")
    evidence.require("probability of loss over that of a copy on one peer", lost / copy, below=0.5)


@claim(
    "A cheaper save pays through more frequent snapshots: the best interval and the time lost both fall with its square root.",
    scale="reduced",
    differs="a model with failures at a constant rate; rate and times of a save are chosen here, the 14-fold is not measured",
    control="the interval stays at what suits the slow save",
    control_breaks=("exponent of the interval", "exponent of the time lost"),
    paper_value="saving over 14 times faster; by Young's formula sqrt(14) = 3.7 times less time lost",
)
def test_cheaper_saves_allow_frequent_snapshots(arm, evidence):
    rate, slowest = 1 / (12 * 3600), 120.0  # a failure every 12 hours, two minutes to save
    saves = slowest / np.geomspace(1, 14, 9)
    intervals = [reft.best_interval(slowest if arm.control else save, rate) for save in saves]
    overheads = [reft.expected_overhead(interval, save, rate) for interval, save in zip(intervals, saves, strict=True)]
    evidence.require("exponent of the interval", exponent_interval(saves, intervals), between=(0.45, 0.55))
    evidence.require("exponent of the time lost", exponent_interval(saves, overheads), between=(0.45, 0.55))
    evidence.record("time lost, slow over fast save", overheads[0] / overheads[-1], "x")
    evidence.record("sqrt(14)", sqrt(14), "x")
    evidence.record("Young's interval over the best one, slowest save", reft.young_interval(slowest, rate) / intervals[0], "x")
    for name, values in (("interval, s", intervals), ("time lost", overheads)):
        evidence.curve(name, saves, values, x_label="time of a save, s", y_label=name, log="xy")
