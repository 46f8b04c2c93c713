"""In-memory checkpoints that survive failures: REFT, first version (Wang et al., 2023, arXiv 2310.12670v1).

Data-parallel ranks hold the same state, so each snapshots only its 1/m into the host's memory. There a snapshot management
process (SMP) keeps it: it outlives the trainer. Erasure coding across the nodes of a sharding group (RAIM5: XOR parity, rotated
over the nodes) makes the loss of a node recoverable; Reed-Solomon parity over GF(256) does the same for several nodes.

    state -> shard_pieces -> NodeMemory (two slots, shared memory) -> encode_node -> rebuild_node

`Cluster` runs real SMPs, one a node. Run as a program, this file is one SMP; it needs numpy alone, so that it starts quickly.
"""

import json
import mmap
import os
import select
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import comb, exp, expm1, sqrt
from pathlib import Path

import numpy as np

CHUNK = 1 << 18  # bytes of every block that are combined at a time: the sum stays in the cache, each block is read once
ALIGN = 64


class UnrecoverableError(RuntimeError):
    """More nodes of a sharding group are lost than its parity covers: reload from storage."""


# Sharding ---------------------------------------------------------------------------------------------------------------------


def shard_pieces(sizes: Sequence[int], ranks: int, rank: int) -> list[tuple[int, int, int]]:
    """Byte ranges that one of `ranks` data-parallel ranks snapshots: together they cover the state once.

    Args:
        sizes: bytes of each tensor of the state, in order.
        ranks: data-parallel degree m.
        rank: which of them, from 0.

    Returns:
        (tensor, start, stop) with 0 <= start < stop <= sizes[tensor], in order; ceil or floor of sum(sizes) / m bytes in all.

    Raises:
        ValueError: ranks < 1, a rank out of range, or a negative size.
    """
    if not 0 <= rank < ranks or min(sizes, default=0) < 0:
        raise ValueError(f"needs 0 <= rank < ranks and sizes from 0 on, got rank {rank} of {ranks}")
    total = sum(sizes)
    first, last = total * rank // ranks, total * (rank + 1) // ranks
    pieces, offset = [], 0
    for tensor, size in enumerate(sizes):
        start, stop = max(first - offset, 0), min(last - offset, size)
        if start < stop:
            pieces.append((tensor, start, stop))
        offset += size
    return pieces


def copy_shard(state: Mapping[str, object], ranks: int, rank: int, out: np.ndarray) -> int:
    """Copy one rank's pieces of a state into `out`; returns their bytes.

    Args:
        state: name -> torch tensor or numpy array, of any shape, dtype and (torch) device; only the pieces leave a device.
        ranks, rank: as in `shard_pieces`.
        out: uint8, flat, at least as long as the shard.

    Raises:
        ValueError: `out` too short or of another type.
    """
    if out.dtype != np.uint8 or out.ndim != 1:
        raise ValueError(f"out must be flat uint8, got {out.dtype} {out.shape}")
    tensors, filled = list(state.values()), 0
    pieces = shard_pieces([tensor.nbytes for tensor in tensors], ranks, rank)
    if sum(stop - start for _, start, stop in pieces) > out.size:
        raise ValueError(f"the shard does not fit into {out.size} bytes")
    for tensor, start, stop in pieces:
        out[filled : filled + stop - start] = _bytes_of(tensors[tensor], start, stop)
        filled += stop - start
    return filled


def load_state(shards: Sequence[np.ndarray], state: Mapping[str, object]) -> None:
    """Write the bytes of all ranks' shards, in order, back into a state of the same names, shapes and dtypes.

    Raises:
        ValueError: another number of bytes than the state has, or shards that are not uint8.
    """
    if any(shard.dtype != np.uint8 for shard in shards):
        raise ValueError("shards must be uint8")
    data = np.concatenate(shards)
    if data.size != sum(tensor.nbytes for tensor in state.values()):
        raise ValueError(f"{data.size} bytes do not fill this state")
    offset = 0
    for tensor in state.values():
        raw = data[offset : offset + tensor.nbytes]
        offset += tensor.nbytes
        if isinstance(tensor, np.ndarray):
            tensor[...] = raw.view(tensor.dtype).reshape(tensor.shape)
        elif raw.size:
            import torch

            tensor.detach().copy_(torch.from_numpy(raw.copy()).view(tensor.dtype).reshape(tensor.shape))


def _bytes_of(tensor, start: int, stop: int) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)[start:stop]
    import torch  # here: an SMP must start without it

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)[start:stop].cpu().numpy()


# GF(256) and the erasure code -------------------------------------------------------------------------------------------------


def _field() -> tuple[np.ndarray, np.ndarray]:
    """Products and inverses in GF(256) with the polynomial x^8 + x^4 + x^3 + x^2 + 1."""
    power, value = np.zeros(510, dtype=np.int64), 1
    for i in range(255):
        power[i] = power[i + 255] = value
        value = value << 1 ^ (0x11D if value & 0x80 else 0)
    logarithm = np.zeros(256, dtype=np.int64)
    logarithm[power[:255]] = np.arange(255)
    product = power[logarithm[:, None] + logarithm]
    product[0] = product[:, 0] = 0
    return product.astype(np.uint8), power[255 - logarithm].astype(np.uint8)


PRODUCT, INVERSE = _field()


def gf_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Matrix product over GF(256): uint8, shapes (i, j) and (j, k)."""
    return np.bitwise_xor.reduce(PRODUCT[a[:, :, None], b[None]], axis=1)


def gf_inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverse over GF(256) by Gauss and Jordan, shape (k, k).

    Raises:
        ValueError: a singular matrix.
    """
    size = len(matrix)
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        pivots = np.flatnonzero(work[column:, column]) + column
        if not pivots.size:
            raise ValueError("singular matrix over GF(256)")
        work[[column, pivots[0]]] = work[[pivots[0], column]]
        work[column] = PRODUCT[INVERSE[work[column, column]], work[column]]
        others = np.arange(size) != column
        work[others] ^= PRODUCT[work[others, column][:, None], work[column]]
    return work[:, size:]


def generator_matrix(data: int, parity: int) -> np.ndarray:
    """Systematic code: any `data` of the data + parity symbols determine the others.

    Returns:
        uint8, shape (data + parity, data): the identity over a Cauchy matrix, scaled so that the first parity is the plain XOR.

    Raises:
        ValueError: no data, negative parity, or more than 256 symbols.
    """
    if data < 1 or parity < 0 or data + parity > 256:
        raise ValueError(f"needs data >= 1, parity >= 0 and at most 256 symbols, got {data} + {parity}")
    rows, columns = np.arange(parity)[:, None], parity + np.arange(data)[None]
    cauchy = INVERSE[rows ^ columns]
    return (
        np.concatenate([np.eye(data, dtype=np.uint8), PRODUCT[cauchy, INVERSE[cauchy[:1]]]])
        if parity
        else np.eye(data, dtype=np.uint8)
    )


def combine(coefficients: Sequence[int], blocks: Sequence[np.ndarray], out: np.ndarray) -> np.ndarray:
    """out = sum of coefficient * block over GF(256), in one streaming pass: every block is read once, `out` written once.

    Args:
        coefficients: 0 to 255; all ones make it XOR.
        blocks: uint8, flat, of equal length; `out` must not overlap them.
        out: uint8, flat, of that length.
    """
    for start in range(0, out.size, CHUNK):
        part = slice(start, start + CHUNK)
        total = out[part]
        total[:] = 0
        for coefficient, block in zip(coefficients, blocks, strict=True):
            if coefficient:
                term = block[part] if coefficient == 1 else PRODUCT[coefficient][block[part]]
                np.bitwise_xor(total, term, out=total)
    return out


# Placement --------------------------------------------------------------------------------------------------------------------


def stripes(nodes: int, parity: int = 1, rotated: bool = True) -> np.ndarray:
    """Where each symbol of each stripe of a sharding group lives.

    A node holds n blocks: n - m of its own shard, then m of parity. Stripe s has its parities on nodes s, ..., s + m - 1 (mod n)
    and one data block of each other node, so that a lost node takes one symbol of every stripe.

    Args:
        nodes: size n of the sharding group.
        parity: parities m of a stripe; 1 is RAIM5.
        rotated: without it a stripe is the node's own shard and the parity beside it, which does not outlive the node.

    Returns:
        int64, shape (n, n, 2): stripe, symbol (data first) -> (node, block).

    Raises:
        ValueError: not 0 <= parity < nodes <= 256.
    """
    if not 0 <= parity < nodes <= 256:
        raise ValueError(f"needs 0 <= parity < nodes <= 256, got {parity} and {nodes}")
    data, used, layout = nodes - parity, [0] * nodes, []
    for stripe in range(nodes):
        if not rotated:
            layout.append([(stripe, block) for block in range(nodes)])
            continue
        holders = [(stripe + row) % nodes for row in range(parity)]
        symbols = [(node, used[node]) for node in range(nodes) if node not in holders]
        for node, _ in symbols:
            used[node] += 1
        layout.append(symbols + [(node, data + row) for row, node in enumerate(holders)])
    return np.array(layout)


def encode_node(images: Sequence[np.ndarray], node: int, layout: np.ndarray, parity: int) -> None:
    """Fill the parity blocks of one node from the data blocks of the others.

    Args:
        images: what each node holds, uint8, shape (n, bytes of a block): data blocks, then parity blocks.
        node: whose parity to compute, in place.
        layout: from `stripes`.
        parity: parities m of a stripe.
    """
    data = len(layout) - parity
    code = generator_matrix(data, parity)
    for symbols in layout:
        blocks = [images[holder][block] for holder, block in symbols[:data]]
        for row, (holder, block) in enumerate(symbols[data:]):
            if holder == node:
                combine(code[data + row], blocks, images[node][block])


def rebuild_node(images: Sequence[np.ndarray | None], node: int, out: np.ndarray, layout: np.ndarray, parity: int) -> None:
    """Compute all blocks of a lost node, data and parity, from the nodes that are left.

    Args:
        images: as in `encode_node`, None for every lost node (`node` among them).
        node: which one to rebuild.
        out: uint8, shape (n, bytes of a block), filled.
        layout, parity: as in `encode_node`.

    Raises:
        UnrecoverableError: some stripe lost more symbols than it has parities; `out` is then not touched.
    """
    data = len(layout) - parity
    code = generator_matrix(data, parity)
    left = [[s for s, (holder, _) in enumerate(symbols) if images[holder] is not None and holder != node] for symbols in layout]
    wanted = [[s for s, (holder, _) in enumerate(symbols) if holder == node] for symbols in layout]
    if any(len(found) < data for found, lost in zip(left, wanted, strict=True) if lost):
        raise UnrecoverableError(f"{sum(image is None for image in images)} nodes lost, {parity} parities in {len(layout)} nodes")
    for symbols, found, lost in zip(layout, left, wanted, strict=True):
        if lost:
            weights = gf_matmul(code[lost], gf_inverse(code[found[:data]]))
            blocks = [images[holder][block] for holder, block in symbols[found[:data]]]
            for symbol, coefficients in zip(lost, weights, strict=True):
                combine(coefficients, blocks, out[symbols[symbol][1]])


def block_bytes(shard_bytes: int, nodes: int, parity: int) -> int:
    """Bytes of a block when a node's shard is split into n - m of them, a whole number of cache lines.

    Raises:
        ValueError: not 0 <= parity < nodes, or a negative size.
    """
    if not 0 <= parity < nodes or shard_bytes < 0:
        raise ValueError(f"needs 0 <= parity < nodes and shard_bytes >= 0, got {parity}, {nodes} and {shard_bytes}")
    return -(-shard_bytes // ((nodes - parity) * ALIGN)) * ALIGN


# Shared memory and its manager ------------------------------------------------------------------------------------------------


class NodeMemory:
    """Snapshots of one node in shared memory: two slots, so that one is whole whenever a writer dies.

    Layout: eight int64 (nodes, parity, bytes of a block, unused, then for each slot the step of its data and of its parity; -1
    where there is none), then two slots of n blocks. A mapped file in the memory file system, which belongs to no process; before
    Python 3.13 `multiprocessing.shared_memory` removes memory when a process that merely attached to it ends.
    """

    HEADER = 64

    def __init__(self, path: str | Path, create: tuple[int, int, int] | None = None):
        """Attach to the memory at `path`, or create it for (nodes, parity, bytes of a block), every page touched.

        Raises:
            FileNotFoundError: nothing there. OSError: not enough memory to create it.
        """
        self.path = Path(path)
        with open(self.path, "x+b" if create else "r+b") as file:
            if create:
                nodes, _, block = create
                size = self.HEADER + 2 * nodes * block
                try:
                    os.posix_fallocate(file.fileno(), 0, size)  # otherwise a full memory file system kills the writer by SIGBUS
                except OSError:
                    self.path.unlink()
                    raise
            raw = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
        self.header = raw[: self.HEADER].view(np.int64)
        if create:
            raw[:] = 0
            self.header[:] = (*create, 0, -1, -1, -1, -1)
        self.nodes, self.parity, self.block = (int(value) for value in self.header[:3])
        self.saved = self.header[4:].reshape(2, 2)
        self.slots = raw[self.HEADER :].reshape(2, self.nodes, self.block)

    @property
    def steps(self) -> list[int]:
        """Step of the data in each slot."""
        return self.saved[:, 0].tolist()

    @property
    def coded_steps(self) -> list[int]:
        """Step of the parity in each slot."""
        return self.saved[:, 1].tolist()

    def shard(self, step: int) -> np.ndarray:
        """Data of one step, flat, a view that includes the padding. Raises KeyError where the step is not there."""
        return self.image(step)[: self.nodes - self.parity].reshape(-1)

    def image(self, step: int) -> np.ndarray:
        """All blocks of one step, shape (n, bytes of a block), a view. Raises KeyError where the step is not there."""
        if step not in self.steps:
            raise KeyError(f"step {step} is not in memory; there are {self.steps}")
        return self.slots[self.steps.index(step)]

    def save(self, step: int, state: Mapping[str, object], ranks: int, rank: int) -> None:
        """Snapshot a rank's shard of `state` over the older slot; it counts from the last instruction on.

        What is there of this step or a later one, from before a failure, is dropped: it may not match the other ranks'.

        Raises:
            ValueError: a negative step (-1 says that there is none), or a shard that does not fit.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        self.saved[self.saved[:, 0] >= step] = -1
        slot = int(np.argmin(self.steps))
        self.saved[slot] = -1
        copy_shard(state, ranks, rank, self.slots[slot, : self.nodes - self.parity].reshape(-1))
        self.saved[slot, 0] = step

    def encode(self, step: int, node: int, peers: Sequence["NodeMemory"], layout: np.ndarray) -> None:
        """Compute this node's parity of one step from every node's memory, in the group's order."""
        images = [peer.image(step) for peer in peers]
        slot = self.steps.index(step)
        self.saved[slot, 1] = -1
        encode_node(images, node, layout, self.parity)
        self.saved[slot, 1] = step

    def rebuild(self, step: int, node: int, peers: Sequence["NodeMemory | None"], layout: np.ndarray) -> None:
        """Fill this node's memory of one step from the nodes that are left; None for the lost.

        Raises:
            UnrecoverableError: too many are lost, or some that is left has no parity of this step.
        """
        if any(peer is not None and step not in peer.coded_steps for peer in peers):
            raise UnrecoverableError(f"no parity of step {step}")
        rebuild_node([peer and peer.image(step) for peer in peers], node, self.slots[0], layout, self.parity)
        self.saved[0] = step


def manage(path: str, nodes: int, parity: int, block: int, node: int, rotated: bool) -> None:
    """A snapshot management process: holds a node's memory, answers one JSON request a line, ends when its input ends.

    Requests: {"do": "encode" or "rebuild", "step": int, "peers": [path or null, ...]}. Answers: {"ok": true} or {"error": text}.
    """
    memory = NodeMemory(path, create=(nodes, parity, block))
    layout = stripes(nodes, parity, rotated)
    try:
        print(json.dumps({"ok": True}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                peers = [peer and (memory if peer == path else NodeMemory(peer)) for peer in request["peers"]]
                {"encode": memory.encode, "rebuild": memory.rebuild}[request["do"]](request["step"], node, peers, layout)
                answer = {"ok": True}
            except Exception as error:  # the requester decides; a manager never dies of a bad request
                answer = {"error": str(error), "unrecoverable": isinstance(error, UnrecoverableError)}
            print(json.dumps(answer), flush=True)
    finally:
        memory.path.unlink(missing_ok=True)
        with suppress(OSError):  # others are still there, or the requester has removed it
            memory.path.parent.rmdir()


class Cluster:
    """The nodes of one sharding group, each a real SMP with its memory; a context manager that leaves nothing behind.

    Args:
        nodes, parity, rotated: as in `stripes`.
        shard_bytes: largest shard that a rank snapshots.
        timeout: seconds that an SMP has to answer.

    Raises:
        TimeoutError: an SMP does not answer in time (its node is then best lost and rebuilt).
        RuntimeError: an SMP reports an error or is gone.
    """

    def __init__(self, nodes: int, shard_bytes: int, parity: int = 1, rotated: bool = True, timeout: float = 120.0):
        self.nodes, self.parity, self.rotated, self.timeout = nodes, parity, rotated, timeout
        self.block = block_bytes(shard_bytes, nodes, parity)
        self.folder = _memory_folder(nodes * (NodeMemory.HEADER + 2 * nodes * self.block))
        self.managers: list[subprocess.Popen | None] = [None] * nodes
        self.paths: list[str | None] = [None] * nodes

    def __enter__(self) -> "Cluster":
        try:
            self._start(range(self.nodes))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def memory(self, node: int) -> NodeMemory:
        """Attach to a node's memory, as its trainer does."""
        return NodeMemory(self.paths[node])

    def complete_step(self) -> int:
        """Newest step whose data every node has; -1 where there is none."""
        common = set.intersection(*(set(self.memory(node).steps) for node in range(self.nodes)))
        return max(common, default=-1)

    def shards(self, step: int, shard_bytes: Sequence[int]) -> list[np.ndarray]:
        """The shards of one step, copied, padding cut off; for `load_state`."""
        return [self.memory(node).shard(step)[:size].copy() for node, size in enumerate(shard_bytes)]

    def encode(self, step: int) -> None:
        """Have every SMP compute its parity of a step that all nodes have."""
        if None in self.paths:
            raise RuntimeError("some nodes are lost: rebuild them first")
        self._ask(range(self.nodes), {"do": "encode", "step": step, "peers": self.paths})

    def lose(self, *nodes: int) -> None:
        """Lose nodes at once: kill their SMPs by SIGKILL and take their memory away."""
        for node in nodes:
            self.managers[node].kill()
        for node in nodes:
            self._discard(node)
            Path(self.paths[node]).unlink(missing_ok=True)
            self.managers[node] = self.paths[node] = None

    def rebuild(self, step: int) -> None:
        """Start new SMPs for the lost nodes and rebuild their memory of one step from the others.

        Raises:
            UnrecoverableError: too many nodes are lost; the new SMPs then run with empty memory.
        """
        lost, left = [node for node in range(self.nodes) if self.paths[node] is None], list(self.paths)
        self._start(lost)
        self._ask(lost, {"do": "rebuild", "step": step, "peers": left})

    def close(self) -> None:
        """End every SMP, by force where it does not end by itself, and remove all memory."""
        for manager in filter(None, self.managers):
            with suppress(BrokenPipeError):
                manager.stdin.close()
        for node, manager in enumerate(self.managers):
            if manager is not None:
                self._discard(node, wait=2.0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, nodes) -> None:
        for node in nodes:
            self.paths[node] = str(self.folder / f"{node}-{uuid.uuid4().hex}")
            arguments = (self.paths[node], self.nodes, self.parity, self.block, node, int(self.rotated))
            self.managers[node] = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).resolve()), *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the requester, whose end ends them
            )
        self._ask(nodes)

    def _ask(self, nodes: Sequence[int], request: dict | None = None) -> None:
        """Send a request to some SMPs at once, hear all their answers, then raise the first failure."""
        failures = []
        for node in nodes if request else ():
            with suppress(BrokenPipeError):  # its answer will say so
                self.managers[node].stdin.write(json.dumps(request) + "\n")
                self.managers[node].stdin.flush()
        for node in nodes:
            try:
                self._hear(node)
            except (RuntimeError, TimeoutError) as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _hear(self, node: int) -> None:
        pipe = self.managers[node].stdout
        if not select.select([pipe], [], [], self.timeout)[0]:
            raise TimeoutError(f"the SMP of node {node} did not answer in {self.timeout:g} s")
        answer = json.loads(pipe.readline() or '{"error": "it is gone"}')
        if answer.get("unrecoverable"):
            raise UnrecoverableError(answer["error"])
        if "error" in answer:
            raise RuntimeError(f"the SMP of node {node}: {answer['error']}")

    def _discard(self, node: int, wait: float | None = None) -> None:
        """Reap a manager that was told to end or killed; by force after `wait` seconds."""
        manager = self.managers[node]
        try:
            manager.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            manager.kill()
            manager.wait()
        manager.stdout.close()
        with suppress(BrokenPipeError):
            manager.stdin.close()


def _memory_folder(needed: int) -> Path:
    """A new folder in the memory file system, or, where there is none with room, in the temporary one."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free >= needed
    return Path(tempfile.mkdtemp(prefix="reft-", dir=memory if fits else None))


# Survival and the snapshot interval -------------------------------------------------------------------------------------------


def survival_probability(nodes: int, parity: int, failure: float, groups: int = 1) -> float:
    """Probability that no sharding group loses more nodes than its parity covers, nodes failing independently.

    P = (sum_{f <= m} C(n, f) p^f (1 - p)^(n - f))^G: no parity gives (1 - p)^(n G); a copy on one peer is nodes = 2, parity = 1.

    Raises:
        ValueError: failure outside [0, 1], parity outside [0, nodes], groups < 1.
    """
    if not 0 <= failure <= 1 or not 0 <= parity <= nodes or groups < 1:
        raise ValueError(
            f"needs 0 <= failure <= 1, 0 <= parity <= nodes and groups >= 1, got {failure}, {parity}, {nodes}, {groups}"
        )
    group = sum(comb(nodes, f) * failure**f * (1 - failure) ** (nodes - f) for f in range(parity + 1))
    return min(group, 1.0) ** groups


def expected_overhead(interval: float, save: float, rate: float, load: float = 0.0) -> float:
    """Expected time lost per unit of work, exactly, under failures at a constant rate.

    E[time for one interval] = exp(rate * load) (exp(rate (interval + save)) - 1) / rate, failures during save and load included;
    to first order save / interval + rate * interval / 2, the paper's wasted time.

    Args:
        interval: work between snapshots. save, load: time of a snapshot and of a restart. rate: failures per unit of time.

    Raises:
        ValueError: interval or rate not positive, negative save or load, or NaN.
    """
    if not (interval > 0 and rate > 0 and save >= 0 and load >= 0):
        raise ValueError(f"needs interval, rate > 0 and save, load >= 0, got {interval}, {rate}, {save}, {load}")
    return exp(rate * load) * expm1(rate * (interval + save)) / (rate * interval) - 1


def young_interval(save: float, rate: float) -> float:
    """Interval that is best to first order, sqrt(2 save / rate) (Young, 1974)."""
    if not (save >= 0 and rate > 0):
        raise ValueError(f"needs save >= 0 and rate > 0, got {save}, {rate}")
    return sqrt(2 * save / rate)


def best_interval(save: float, rate: float) -> float:
    """Interval that minimises `expected_overhead`: (1 + W(-exp(-1 - rate * save))) / rate, W Lambert's function, main branch."""
    from scipy.special import lambertw

    if not (save > 0 and rate > 0):
        raise ValueError(f"needs save, rate > 0, got {save}, {rate}")
    branch = sqrt(-2 * expm1(-rate * save))
    if branch < 1e-3:  # too near to the branch point of W for its argument in floating point: the series there
        return (branch - branch**2 / 3 + 11 * branch**3 / 72) / rate
    return (1 + float(lambertw(-exp(-1 - rate * save)).real)) / rate


if __name__ == "__main__":
    _path, *_numbers = sys.argv[1:]
    _nodes, _parity, _block, _node, _rotated = map(int, _numbers)
    manage(_path, _nodes, _parity, _block, _node, bool(_rotated))
