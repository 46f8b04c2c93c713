"""Which body of an operator runs, and how its Triton kernels are started; shared by all kernels."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

Launch = Callable[..., None]


def choose_backend(backend: str, tensor: Tensor) -> str:
    """Body that runs for `tensor`: "triton" or "torch".

    "auto" takes Triton for CUDA tensors, where it is installed, and the PyTorch body elsewhere. "triton" on a CPU tensor
    runs interpreted, for tests: it needs TRITON_INTERPRET=1 in the environment before Triton is first imported.

    Raises:
        ValueError: an unknown backend, Triton missing, or a CPU tensor without the interpreter.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is 'auto', 'torch' or 'triton', got {backend!r}")
    if backend == "auto":
        return "triton" if tensor.is_cuda and find_spec("triton") else "torch"
    if backend == "triton" and not find_spec("triton"):
        raise ValueError("backend='triton' needs Triton: pip install triton")
    if backend == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend='triton' on a CPU tensor runs interpreted: set TRITON_INTERPRET=1 before the first import")
    return backend


def launch(kernel: Callable, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Starts a Triton kernel on the device of its first argument, a tensor.

    Host code takes this function as an argument, so that memory can be accounted without a GPU.
    """
    if all(grid):
        with torch.cuda.device_of(arguments[0]) if arguments[0].is_cuda else nullcontext():
            kernel[grid](*arguments, **constants)


def blocks(length: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` that cover `range(length)`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
