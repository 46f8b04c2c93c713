"""In-memory checkpoints: the code against brute force, the shared memory and the real processes, the formulas by simulation."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations, product
from math import exp, prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from paperclaims.impl.distributed import reft_inmemory_ckpt as reft


def slow_product(a, b):
    """Multiplication in GF(256), bit by bit."""
    total = 0
    while b:
        total ^= a if b & 1 else 0
        a = a << 1 ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return total


def group(nodes, parity, size=24, rotated=True, seed=0):
    layout = reft.stripes(nodes, parity, rotated)
    images = np.random.default_rng(seed).integers(0, 256, (nodes, nodes, size), dtype=np.uint8)
    for node in range(nodes):
        reft.encode_node(images, node, layout, parity)
    return images, layout


def without(images, lost):
    return [None if node in lost else image for node, image in enumerate(images)]


# Sharding ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[10], [7, 0, 5, 13], [1, 1, 1], [], [0]])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shards_cover_every_byte_once(sizes, ranks):
    covered, lengths = [], []
    for rank in range(ranks):
        pieces = reft.shard_pieces(sizes, ranks, rank)
        assert all(0 <= start < stop <= sizes[tensor] for tensor, start, stop in pieces)
        covered += [(tensor, byte) for tensor, start, stop in pieces for byte in range(start, stop)]
        lengths.append(sum(stop - start for _, start, stop in pieces))
    assert covered == [(tensor, byte) for tensor, size in enumerate(sizes) for byte in range(size)]
    assert max(lengths) - min(lengths) <= 1


def state_of_every_kind():
    return {
        "float": torch.randn(5, 7),
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 6).T,
        "array": np.random.default_rng(0).integers(0, 9, (3, 3), dtype=np.int16).T,
        "empty": torch.empty(0, 3),
    }


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_state_survives_its_shards(ranks):
    state = state_of_every_kind()
    shards = []
    for rank in range(ranks):
        out = np.zeros(1000, dtype=np.uint8)
        shards.append(out[: reft.copy_shard(state, ranks, rank, out)])
    restored = {name: (np if isinstance(tensor, np.ndarray) else torch).zeros_like(tensor) for name, tensor in state.items()}
    reft.load_state(shards, restored)
    for name, tensor in state.items():
        assert restored[name].dtype == tensor.dtype
        assert np.array_equal(np.asarray(restored[name].tolist()), np.asarray(tensor.tolist()))


# The code ---------------------------------------------------------------------------------------------------------------------


def test_field_against_bitwise_multiplication():
    assert all(reft.PRODUCT[a, b] == slow_product(a, b) for a, b in product(range(256), repeat=2))
    assert all(slow_product(a, int(reft.INVERSE[a])) == 1 for a in range(1, 256))


def test_field_against_reedsolo():
    reedsolo = pytest.importorskip("reedsolo")
    reedsolo.init_tables(0x11D)
    assert all(reft.PRODUCT[a, b] == reedsolo.gf_mul(a, b) for a, b in product(range(0, 256, 5), range(256)))
    assert all(reft.INVERSE[a] == reedsolo.gf_inverse(a) for a in range(1, 256))


def test_matrices_over_the_field():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 256, (3, 4), dtype=np.uint8), generator.integers(0, 256, (4, 5), dtype=np.uint8)
    found = reft.gf_matmul(a, b)
    for i, k in np.ndindex(3, 5):
        assert found[i, k] == np.bitwise_xor.reduce([slow_product(int(a[i, j]), int(b[j, k])) for j in range(4)])
    square = np.array([[0, 3, 1], [5, 0, 2], [7, 1, 0]], dtype=np.uint8)
    assert np.array_equal(reft.gf_matmul(square, reft.gf_inverse(square)), np.eye(3))
    assert np.array_equal(reft.gf_matmul(reft.gf_inverse(square), square), np.eye(3))
    with pytest.raises(ValueError, match="singular"):
        reft.gf_inverse(np.array([[1, 2], [1, 2]], dtype=np.uint8))


@pytest.mark.parametrize(("data", "parity"), [(1, 1), (2, 2), (4, 3), (6, 2), (3, 5)])
def test_any_data_symbols_determine_the_rest(data, parity):
    code = reft.generator_matrix(data, parity)
    assert np.array_equal(code[:data], np.eye(data))
    assert (code[data] == 1).all()
    for rows in combinations(range(data + parity), data):
        reft.gf_inverse(code[list(rows)])


def test_code_at_its_limits():
    assert reft.generator_matrix(3, 0).shape == (3, 3)
    assert reft.generator_matrix(254, 2).shape == (256, 254)
    assert len(set(reft.generator_matrix(254, 2)[255].tolist())) == 254  # else two columns make two parities dependent


@pytest.mark.parametrize("size", [1, 100, reft.CHUNK, reft.CHUNK + 3])
def test_combine_is_the_sum_of_products(size):
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (4, size), dtype=np.uint8)
    out = np.full(size, 77, dtype=np.uint8)
    assert reft.combine([1, 0, 9, 255], blocks, out) is out
    for byte in {0, size // 2, size - 1}:
        one, _, nine, last = (int(value) for value in blocks[:, byte])
        assert out[byte] == one ^ slow_product(9, nine) ^ slow_product(255, last)
    assert np.array_equal(reft.combine([1] * 4, blocks, out), np.bitwise_xor.reduce(blocks))


# Placement --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "parity"), [(2, 1), (3, 1), (6, 1), (5, 2), (7, 3), (4, 0)])
def test_every_block_has_one_place_and_every_stripe_other_nodes(nodes, parity):
    layout = reft.stripes(nodes, parity)
    assert sorted(map(tuple, layout.reshape(-1, 2))) == list(product(range(nodes), repeat=2))
    for stripe, symbols in enumerate(layout):
        assert sorted(symbols[:, 0]) == list(range(nodes))
        assert symbols[nodes - parity :, 0].tolist() == [(stripe + row) % nodes for row in range(parity)]
        assert (symbols[: nodes - parity, 1] < nodes - parity).all()
        assert symbols[nodes - parity :, 1].tolist() == [nodes - parity + row for row in range(parity)]
    own = reft.stripes(nodes, parity, rotated=False)
    assert sorted(map(tuple, own.reshape(-1, 2))) == list(product(range(nodes), repeat=2))
    assert (own[..., 0] == np.arange(nodes)[:, None]).all()


@pytest.mark.parametrize("nodes", [2, 3, 6])
def test_raim5_parity_is_the_exclusive_or(nodes):
    images, layout = group(nodes, 1)
    for stripe, symbols in enumerate(layout):
        blocks = [images[node][block] for node, block in symbols[:-1]]
        assert np.array_equal(images[stripe][-1], np.bitwise_xor.reduce(blocks))


def test_encoding_touches_its_own_parity_only():
    images, layout = group(5, 2)
    damaged = images.copy()
    damaged[:, 3:] = 0
    reft.encode_node(damaged, 2, layout, 2)
    assert np.array_equal(damaged[2], images[2])
    others = [0, 1, 3, 4]
    assert not damaged[others][:, 3:].any()
    assert np.array_equal(damaged[:, :3], images[:, :3])


@pytest.mark.parametrize(("nodes", "parity"), [(2, 1), (3, 1), (5, 1), (4, 2), (6, 2), (6, 3)])
def test_all_losses_that_parity_covers_are_rebuilt_and_no_others(nodes, parity):
    images, layout = group(nodes, parity)
    for count in range(1, nodes + 1):
        for lost in combinations(range(nodes), count):
            out = np.full_like(images[0], 7)
            if count <= parity:
                reft.rebuild_node(without(images, lost), lost[0], out, layout, parity)
                assert np.array_equal(out, images[lost[0]])
            else:
                with pytest.raises(reft.UnrecoverableError, match=f"{count} nodes lost"):
                    reft.rebuild_node(without(images, lost), lost[-1], out, layout, parity)
                assert (out == 7).all()


def test_parity_beside_its_data_goes_with_it():
    images, layout = group(4, 1, rotated=False)
    with pytest.raises(reft.UnrecoverableError):
        reft.rebuild_node(without(images, [1]), 1, np.zeros_like(images[1]), layout, 1)


def test_block_bytes():
    assert [reft.block_bytes(size, 4, 1) for size in (0, 1, 192, 193)] == [0, 64, 64, 128]
    assert reft.block_bytes(1000, 6, 2) == 256
    assert reft.block_bytes(1000, 5, 0) == 256


# Shared memory ----------------------------------------------------------------------------------------------------------------


def test_memory_keeps_the_last_two_steps(tmp_path):
    memory = reft.NodeMemory(tmp_path / "node", create=(3, 1, 64))
    other = reft.NodeMemory(tmp_path / "node")
    assert (other.nodes, other.parity, other.block) == (3, 1, 64)
    assert other.slots.shape == (2, 3, 64)
    assert other.steps == other.coded_steps == [-1, -1]
    for step in (1, 2, 3):
        memory.save(step, {"a": np.full(128, step, dtype=np.uint8)}, 1, 0)
    assert sorted(other.steps) == [2, 3]
    assert (other.shard(3) == 3).all()
    assert (other.shard(2) == 2).all()
    assert other.shard(2).shape == (128,)
    assert other.image(2).shape == (3, 64)
    with pytest.raises(KeyError, match="step 1"):
        other.image(1)


def test_a_new_life_drops_the_steps_of_the_old_one(tmp_path):
    memory = reft.NodeMemory(tmp_path / "node", create=(2, 1, 64))
    for step, value in ((4, 0), (5, 1), (5, 2)):
        memory.save(step, {"a": np.full(64, value, dtype=np.uint8)}, 1, 0)
    assert sorted(memory.steps) == [4, 5]
    assert (memory.shard(5) == 2).all()
    memory.save(4, {"a": np.full(64, 3, dtype=np.uint8)}, 1, 0)
    assert sorted(memory.steps) == [-1, 4]
    assert (memory.shard(4) == 3).all()


def test_a_writer_that_dies_leaves_the_other_slot(tmp_path):
    class Dying(dict):
        def values(self):
            raise KeyboardInterrupt

    memory = reft.NodeMemory(tmp_path / "node", create=(2, 1, 64))
    peers = [memory, memory]
    layout = reft.stripes(2, 1)
    for step in (5, 6):
        memory.save(step, {"a": np.full(64, step, dtype=np.uint8)}, 1, 0)
        memory.encode(step, 0, peers, layout)
    assert sorted(memory.coded_steps) == [5, 6]
    with pytest.raises(KeyboardInterrupt):
        memory.save(7, Dying(), 1, 0)
    assert sorted(memory.steps) == [-1, 6]
    assert sorted(memory.coded_steps) == [-1, 6]
    assert (memory.shard(6) == 6).all()
    for step in (8, 9):
        with pytest.raises(KeyboardInterrupt):
            memory.save(step, Dying(), 1, 0)
        memory.save(step, {"a": np.full(64, step, dtype=np.uint8)}, 1, 0)
        assert memory.steps.count(-1) == 0
        assert memory.coded_steps[memory.steps.index(step)] == -1


def test_memory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        reft.NodeMemory(tmp_path / "nothing")
    reft.NodeMemory(tmp_path / "node", create=(2, 1, 64))
    with pytest.raises(FileExistsError):
        reft.NodeMemory(tmp_path / "node", create=(2, 1, 64))
    with pytest.raises(OSError):  # noqa: PT011 - no space, or too large a file, by file system
        reft.NodeMemory(tmp_path / "large", create=(2, 1, 1 << 58))
    assert not (tmp_path / "large").exists()
    with pytest.raises(ValueError, match="negative"):
        reft.NodeMemory(tmp_path / "node").save(-1, {"a": np.zeros(1)}, 1, 0)


def test_memory_goes_where_there_is_room(monkeypatch):
    monkeypatch.setattr(reft.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    folders = [reft._memory_folder(needed) for needed in (100, 101)]
    for folder in folders:
        folder.rmdir()
        assert folder.name.startswith("reft-")
    assert Path("/dev/shm") not in folders[1].parents
    assert (Path("/dev/shm") in folders[0].parents) == Path("/dev/shm").is_dir()


def test_a_cluster_asks_for_the_room_that_its_nodes_take(tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(reft, "_memory_folder", lambda size: needed.append(size) or tmp_path)
    cluster = reft.Cluster(3, 1000)
    reft.NodeMemory(tmp_path / "node", create=(3, 1, cluster.block))
    assert needed == [3 * (tmp_path / "node").stat().st_size]


# Real processes ---------------------------------------------------------------------------------------------------------------


def eventually(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_cluster_loses_rebuilds_and_leaves_nothing():
    state = {"weight": torch.randn(37, 11), "step": torch.tensor(3)}
    lengths = [sum(b - a for _, a, b in reft.shard_pieces([t.nbytes for t in state.values()], 3, r)) for r in range(3)]
    with reft.Cluster(3, max(lengths)) as cluster:
        assert cluster.complete_step() == -1
        for step in (1, 2):
            for rank in range(3):
                assert cluster.complete_step() == (step - 1 or -1)
                cluster.memory(rank).save(step, state, 3, rank)
        assert cluster.complete_step() == 2
        cluster.encode(2)
        assert all(cluster.memory(rank).coded_steps == [-1, 2] for rank in range(3))
        pids = [manager.pid for manager in cluster.managers]
        cluster.lose(1)
        with pytest.raises(RuntimeError, match="nodes are lost"):
            cluster.encode(2)
        assert [alive(pid) for pid in pids] == [True, False, True]
        cluster.rebuild(2)
        assert cluster.memory(1).steps[0] == cluster.memory(1).coded_steps[0] == 2
        cluster.lose(0)  # a second loss, now that the group is whole again
        cluster.rebuild(2)
        restored = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        reft.load_state(cluster.shards(2, lengths), restored)
        assert all(torch.equal(restored[name], state[name]) for name in state)
        cluster.lose(0, 2)
        with pytest.raises(reft.UnrecoverableError, match="2 nodes lost"):
            cluster.rebuild(2)
        managers, folder = list(cluster.managers), cluster.folder
        assert len(list(folder.iterdir())) == 3
    assert [manager.returncode for manager in managers] == [0, 0, 0]  # ended when told to, not by force
    assert not folder.exists()


def test_a_manager_answers_each_request_and_leaves_nothing(tmp_path):
    path = tmp_path / "group" / "node"
    path.parent.mkdir()
    command = [sys.executable, "-P", reft.__file__, str(path), *["2", "1", "64", "0", "1"]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as manager:
        answers = [json.loads(manager.stdout.readline())]
        memory = reft.NodeMemory(path)
        memory.save(3, {"a": np.arange(64, dtype=np.uint8)}, 1, 0)
        for request in (("encode", 3, [str(path)] * 2), ("encode", 4, [str(path)] * 2), ("rebuild", 4, [str(path), None])):
            manager.stdin.write(json.dumps(dict(zip(("do", "step", "peers"), request, strict=True))) + "\n")
            manager.stdin.flush()
            answers.append(json.loads(manager.stdout.readline()))
        manager.stdin.close()
        assert manager.wait(60) == 0
    assert answers[:2] == [{"ok": True}] * 2
    assert [answer.get("unrecoverable") for answer in answers[2:]] == [False, True]
    assert "step 4 is not in memory" in answers[2]["error"]
    assert not path.parent.exists()


def test_a_cluster_that_does_not_start_leaves_nothing(monkeypatch):
    monkeypatch.setattr(reft.sys, "executable", shutil.which("false"))
    cluster = reft.Cluster(2, 64)
    with pytest.raises(RuntimeError, match=r"node 0.*gone"):
        cluster.__enter__()
    assert not cluster.folder.exists()


def test_no_parity_of_a_step_is_reported():
    with reft.Cluster(2, 64) as cluster:
        for rank, steps in enumerate([(1, 2), (3, 4)]):
            for step in steps:
                cluster.memory(rank).save(step, {"a": np.zeros(128, dtype=np.uint8)}, 2, rank)
        assert cluster.complete_step() == -1  # none in common
        for rank in range(2):
            cluster.memory(rank).save(4, {"a": np.arange(128, dtype=np.uint8)}, 2, rank)
        with pytest.raises(RuntimeError, match="step 9"):
            cluster.encode(9)
        cluster.lose(0)
        with pytest.raises(reft.UnrecoverableError, match="no parity of step 4"):
            cluster.rebuild(4)


def test_a_manager_that_hangs_is_not_waited_for():
    with reft.Cluster(2, 64) as cluster:
        for rank in range(2):
            cluster.memory(rank).save(0, {"a": np.zeros(128, dtype=np.uint8)}, 2, rank)
        cluster.timeout = 1.0
        os.kill(cluster.managers[0].pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError, match="node 0"):
            cluster.encode(0)
        cluster.managers[0].kill()
        with pytest.raises(RuntimeError, match=r"node 0.*gone"):
            cluster.encode(0)
        folder = cluster.folder
    assert not folder.exists()


def test_a_manager_that_hangs_is_ended_by_force():
    with reft.Cluster(2, 64) as cluster:
        managers, folder = list(cluster.managers), cluster.folder
        os.kill(managers[0].pid, signal.SIGSTOP)
    assert [manager.returncode for manager in managers] == [-signal.SIGKILL, 0]
    assert not folder.exists()


def test_managers_end_with_the_process_that_started_them():
    program = (
        f"import runpy, os, sys, json; reft = runpy.run_path({reft.__file__!r});"
        "cluster = reft['Cluster'](2, 64).__enter__();"
        "print(json.dumps([str(cluster.folder), [manager.pid for manager in cluster.managers]]), flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9
    folder, pids = json.loads(done.stdout)
    eventually(lambda: not any(map(alive, pids)) and not Path(folder).exists())


# Survival and interval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "parity", "groups"), [(3, 1, 1), (4, 2, 2), (2, 1, 3), (3, 0, 2), (2, 2, 1)])
def test_survival_by_enumeration(nodes, parity, groups):
    failure, expected = 0.2, 0.0
    for failed in product((0, 1), repeat=nodes * groups):
        if all(sum(failed[g * nodes : (g + 1) * nodes]) <= parity for g in range(groups)):
            expected += prod(failure if f else 1 - failure for f in failed)
    assert reft.survival_probability(nodes, parity, failure, groups) == pytest.approx(expected, rel=1e-12)


def test_overhead_by_simulation():
    interval, save, rate, load = 30.0, 4.0, 1 / 60, 7.0
    generator, elapsed, count = np.random.default_rng(0), 0.0, 40_000
    for _ in range(count):
        need = interval + save
        while (failure := generator.exponential(1 / rate)) < need:
            elapsed += failure
            need = load + interval + save
        elapsed += need
    simulated = elapsed / count / interval - 1
    assert reft.expected_overhead(interval, save, rate, load) == pytest.approx(simulated, rel=0.03)


def test_overhead_to_first_order():
    interval, save, rate = 100.0, 1.0, 1e-6
    assert reft.expected_overhead(interval, save, rate) == pytest.approx(save / interval + rate * interval / 2, rel=0.02)
    assert reft.expected_overhead(interval, 0.0, rate) == pytest.approx(rate * interval / 2, rel=1e-4)


@pytest.mark.parametrize("save", [0.5, 20.0, 400.0])
def test_best_interval_is_the_minimum(save):
    rate = 1e-3
    best = reft.best_interval(save, rate)
    least = reft.expected_overhead(best, save, rate)
    assert all(least < reft.expected_overhead(best * factor, save, rate) for factor in (0.99, 1.01))
    assert exp(-1e-3) < reft.best_interval(1e-3, rate) / reft.young_interval(1e-3, rate) < 1
    assert reft.young_interval(2.0, 0.25) == 4.0


def test_best_interval_of_a_save_that_costs_almost_nothing():
    """The condition of the minimum, (1 - u) exp(u) = exp(-save) at rate 1, solved as a series: save = u^2 / 2 + u^3 / 3 + ..."""
    for save in (1e-30, 1e-18, 1e-10, 4.9e-7, 5.1e-7):
        best = reft.best_interval(save, 1.0)
        assert sum(best**power / power for power in range(2, 9)) == pytest.approx(save, rel=1e-8, abs=0)
        assert reft.best_interval(save / 5, 5.0) == pytest.approx(best / 5, rel=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: reft.shard_pieces([3], 0, 0),
        lambda: reft.shard_pieces([3], 2, 2),
        lambda: reft.shard_pieces([3], 2, -1),
        lambda: reft.shard_pieces([3, -1], 2, 0),
        lambda: reft.copy_shard({"a": np.zeros(9)}, 1, 0, np.zeros(71, dtype=np.uint8)),
        lambda: reft.copy_shard({"a": np.zeros(9)}, 1, 0, np.zeros(72)),
        lambda: reft.copy_shard({"a": np.zeros(9)}, 1, 0, np.zeros((2, 72), dtype=np.uint8)),
        lambda: reft.combine([1, 1], [np.zeros(9, dtype=np.uint8)], np.zeros(9, dtype=np.uint8)),
        lambda: reft.load_state([np.zeros(71, dtype=np.uint8)], {"a": np.zeros(9)}),
        lambda: reft.load_state([np.zeros(73, dtype=np.uint8)], {"a": np.zeros(9)}),
        lambda: reft.load_state([np.zeros(72)], {"a": np.zeros(9)}),
        lambda: reft.block_bytes(64, 2, 2),
        lambda: reft.block_bytes(64, 2, -1),
        lambda: reft.block_bytes(-1, 2, 1),
        lambda: reft.Cluster(2, 64, parity=2),
        lambda: reft.generator_matrix(0, 1),
        lambda: reft.generator_matrix(2, -1),
        lambda: reft.generator_matrix(254, 3),
        lambda: reft.stripes(3, 3),
        lambda: reft.stripes(3, -1),
        lambda: reft.stripes(257, 1),
        lambda: reft.survival_probability(3, 1, 1.1),
        lambda: reft.survival_probability(3, 1, float("nan")),
        lambda: reft.survival_probability(3, 4, 0.1),
        lambda: reft.survival_probability(3, 1, 0.1, 0),
        lambda: reft.expected_overhead(0.0, 1.0, 0.1),
        lambda: reft.expected_overhead(1.0, -1.0, 0.1),
        lambda: reft.expected_overhead(1.0, 1.0, 0.0),
        lambda: reft.expected_overhead(1.0, 1.0, 0.1, -1.0),
        lambda: reft.expected_overhead(float("nan"), 1.0, 0.1),
        lambda: reft.young_interval(-1.0, 0.1),
        lambda: reft.young_interval(1.0, 0.0),
        lambda: reft.best_interval(0.0, 0.1),
        lambda: reft.best_interval(1.0, 0.0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"needs|must|does not fit|do not fill|shorter"):
        call()
