"""REFT: Reliable and Efficient In-Memory Fault Tolerance of Large Language Model Pretraining (Wang et al., 2023, arXiv 2310.12670v1).

Nodes are processes of this machine: a snapshot management process (SMP) with shared memory and a trainer. Losing a node kills its
SMP by SIGKILL and takes its memory away.
"""

import inspect
import json
import os
import select
import signal
import subprocess
import sys
import time
from itertools import combinations
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from paperclaims.fixtures.measurement import interleaved
from paperclaims.fixtures.protocol import claim
from paperclaims.fixtures.statistics import Interval, exponent_interval, proportion_interval
from paperclaims.impl.distributed import reft_inmemory_ckpt as reft
from paperclaims.impl.distributed.reft_inmemory_ckpt import Cluster, UnrecoverableError

TIMEOUT = 120.0
ONE_MACHINE = "nodes are processes of one machine"


def mixed_state(rng, size):
    """A state of odd shapes and several types, about `size` bytes."""
    return {
        "weight": rng.standard_normal((3, size // 24)).astype(np.float32),
        "moment": rng.standard_normal(size // 16),
        "quantised": rng.integers(-128, 128, 1021, dtype=np.int8),
        "step": np.array(rng.integers(1 << 40)),
    }


def shard_sizes(state, ranks):
    sizes = [tensor.nbytes for tensor in state.values()]
    return [sum(stop - start for _, start, stop in reft.shard_pieces(sizes, ranks, rank)) for rank in range(ranks)]


def same(state, other):
    return all(np.array_equal(state[name].view(np.uint8), other[name].view(np.uint8)) for name in state)


# Killed trainers --------------------------------------------------------------------------------------------------------------


def train_step(state, data, labels):
    """Softmax regression by Adam on a random batch; the generator is part of the state."""
    generator = np.random.Generator(np.random.PCG64())
    words = [int(word) for word in state["rng"]]
    internal = {"state": words[0] << 64 | words[1], "inc": words[2] << 64 | words[3]}
    generator.bit_generator.state = {"bit_generator": "PCG64", "state": internal, "has_uint32": 0, "uinteger": 0}
    batch = generator.choice(len(data), 32, replace=False)
    internal = generator.bit_generator.state["state"]
    low = (1 << 64) - 1
    state["rng"][:] = [value for word in (internal["state"], internal["inc"]) for value in (word >> 64, word & low)]
    scores = data[batch] @ state["weight"]
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    chances[np.arange(32), labels[batch]] -= 1
    gradient = data[batch].T @ chances / 32
    state["step"] += 1
    state["mean"] += 0.1 * (gradient - state["mean"])
    state["square"] += 0.001 * (gradient**2 - state["square"])
    corrected = state["mean"] / (1 - 0.9 ** state["step"]), state["square"] / (1 - 0.999 ** state["step"])
    state["weight"] -= 0.01 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)


def trainer(library, arguments):
    """One data-parallel rank: a step and a snapshot for every line of input, then the digest of its whole state."""
    import hashlib
    import json
    import runpy
    import sys

    import numpy as np

    reft, options = runpy.run_path(library), json.loads(arguments)
    memory = reft["NodeMemory"](options["paths"][options["rank"]])
    if options["private"]:
        memory = reft["NodeMemory"](f"{memory.path}.private", create=(memory.nodes, memory.parity, memory.block))
        memory.path.unlink()
    with np.load(options["data"]) as file:
        data, labels = file["data"], file["labels"]
    shape = (data.shape[1], 10)
    state = {"weight": np.zeros(shape), "mean": np.zeros(shape), "square": np.zeros(shape), "step": np.zeros((), dtype=np.int64)}
    state["rng"] = np.array(options["rng"], dtype=np.uint64)
    ranks = len(options["paths"])
    if options["resume"] >= 0:
        total = [tensor.nbytes for tensor in state.values()]
        shards = []
        for rank, path in enumerate(options["paths"]):
            size = sum(stop - start for _, start, stop in reft["shard_pieces"](total, ranks, rank))
            shards.append(reft["NodeMemory"](path).shard(options["resume"])[:size])
        reft["load_state"](shards, state)
    print(json.dumps(int(state["step"])), flush=True)
    for _ in iter(sys.stdin.readline, "stop\n"):
        train_step(state, data, labels)
        memory.save(int(state["step"]), state, ranks, options["rank"])
        print(json.dumps(int(state["step"])), flush=True)
    print(json.dumps(hashlib.sha256(b"".join(tensor.tobytes() for tensor in state.values())).hexdigest()), flush=True)


class Trainers:
    """All ranks as processes of their own; a line to each of them stands for the all-reduce of a step."""

    def __init__(self, cluster, data, rng_words, private=False, resume=-1):
        program = "import numpy as np\n" + inspect.getsource(train_step) + inspect.getsource(trainer) + "trainer(*sys.argv[1:])"
        self.processes = []
        for rank in range(cluster.nodes):
            options = {"paths": cluster.paths, "rank": rank, "data": str(data), "rng": rng_words, "private": private, "resume": resume}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", "import sys\n" + program, reft.__file__, json.dumps(options)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def tell(self, line):
        for process in self.processes:
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def hear(self):
        heard = []
        for process in self.processes:
            assert select.select([process.stdout], [], [], TIMEOUT)[0], "a trainer does not answer"
            line = process.stdout.readline()
            assert line, "a trainer ended"
            heard.append(json.loads(line))
        return heard

    def run_to(self, step):
        while self.steps() < step:
            self.tell("step")

    def steps(self):
        (step,) = set(self.hear())
        return step

    def finish(self):
        self.tell("stop")
        return self.hear()

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            process.stdin.close() if not process.stdin.closed else None
            process.stdout.close()
