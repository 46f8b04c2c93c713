"""MoRA, a self-activated sparse mixture of rank-1 experts (Lu, Zhao, Xue, Yao, Moore, Gong, 2025, arXiv 2506.21035 v2).

Every rank i of a LoRA update is an expert of its own: a key A_i and a value B_i. The keys' activations A x, which the update
needs anyway, also say how relevant each expert is, so that there is no router.
"""

import math

import torch
from torch import Tensor, nn

__all__ = ["MixtureOfRanks", "mixture_of_ranks", "relevance", "self_activated_gates"]


def relevance(activations: Tensor) -> Tensor:
    """Normalised scores s_i = A_i x / sqrt(sum_j (A_j x)^2), in [-1, 1], over all experts of the pool.

    Args:
        activations: A x, shape (..., R), floating point.

    Returns:
        Shape (..., R); zeros where all activations are zero.

    Raises:
        ValueError: not floating point, or no expert.
    """
    if activations.ndim < 1 or activations.shape[-1] < 1 or not activations.is_floating_point():
        raise ValueError(
            f"activations must be floating point (..., R >= 1), got {activations.dtype} of {tuple(activations.shape)}"
        )
    norm = torch.linalg.vector_norm(activations, dim=-1, keepdim=True)
    return activations / norm.clamp_min(torch.finfo(activations.dtype).tiny)


def self_activated_gates(
    activations: Tensor,
    *,
    temperature: float,
    budget: int | None = None,
    threshold: float | None = None,
    renormalise: bool = False,
) -> Tensor:
    """Gate of every expert: softmax(s / temperature), zero beyond the budget and below the threshold.

    Args:
        activations: A x, shape (..., R), floating point.
        temperature: of the softmax over all R experts, above 0.
        budget: k, the number of experts with the largest scores that stay; None or k >= R keeps all.
        threshold: delta, experts with s_i < delta are pruned (at test time in the paper), which may leave none.
        renormalise: let the gates that stay sum to 1 (to 0 where none stays). The paper only masks.

    Returns:
        Shape (..., R), entries in [0, 1].

    Raises:
        ValueError: as in `relevance`; a temperature or a budget that is not positive, or a NaN threshold.

    Source: the paper's section on self-activated sparse mixtures of ranks.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if budget is not None and not budget >= 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("threshold is NaN")
    scores = relevance(activations)
    gates = torch.softmax(scores / temperature, dim=-1)
    if budget is not None and budget < scores.shape[-1]:
        chosen = scores.topk(budget, dim=-1).indices
        gates = torch.zeros_like(gates).scatter(-1, chosen, gates.gather(-1, chosen))
    if threshold is not None:
        gates = gates.masked_fill(scores < threshold, 0)
    if renormalise:
        gates = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    return gates


def mixture_of_ranks(x: Tensor, keys: Tensor, values: Tensor, *, scale: float = 1.0, gather: bool = False, **gating) -> Tensor:
    """Update of a layer's output: scale * sum_i w_i(x) B_i (A_i x).

    Args:
        x: inputs, shape (..., n, d_in).
        keys: A, shape (..., R, d_in); leading dimensions broadcast against those of x.
        values: B, shape (..., d_out, R).
        scale: constant factor (LoRA's alpha / r).
        gather: multiply only the values of the `budget` best experts of each row, n x budget x d_out numbers gathered, instead of
            all R masked; for keys and values without leading dimensions.
        gating: `temperature`, `budget`, `threshold` and `renormalise` of `self_activated_gates`.

    Returns:
        Shape (..., n, d_out).

    Raises:
        ValueError: shapes that do not fit, gather with stacked experts or without a budget, or as in `self_activated_gates`.
    """
    if min(x.ndim, keys.ndim, values.ndim) < 2 or x.shape[-1] != keys.shape[-1] or keys.shape[-2] != values.shape[-1]:
        raise ValueError(
            f"x (..., n, d_in), keys (..., R, d_in) and values (..., d_out, R) do not fit: "
            f"{tuple(x.shape)}, {tuple(keys.shape)}, {tuple(values.shape)}"
        )
    budget = gating.get("budget")
    if gather and (budget is None or keys.ndim + values.ndim > 4):
        raise ValueError("gather needs a budget, and keys and values without leading dimensions")
    activations = x @ keys.mT
    gates = self_activated_gates(activations, **gating)
    gated = scale * gates * activations
    if not gather:
        return gated @ values.mT
    best = relevance(activations).topk(min(budget, keys.shape[0]), dim=-1).indices
    return (gated.gather(-1, best).unsqueeze(-2) @ values.mT[best]).squeeze(-2)


class MixtureOfRanks(nn.Module):
    """A frozen linear layer and a growing pool of rank-1 experts: y = W0 x + b + scale * sum_i w_i(x) B_i (A_i x).

    `add_task` freezes the experts so far and adds new ones; only those have gradients. The threshold holds in evaluation mode.

    Args:
        linear: the layer to adapt; its parameters are frozen in place.
        temperature: of the gates' softmax.
        budget: experts active for one input at most; None for all.
        threshold: scores below it are pruned in evaluation mode; None for no pruning.
        scale: constant factor on the update.
        renormalise: let the active gates sum to 1.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        temperature: float,
        budget: int | None = None,
        threshold: float | None = None,
        scale: float = 1.0,
        renormalise: bool = False,
    ):
        super().__init__()
        self_activated_gates(torch.zeros(1), temperature=temperature, budget=budget, threshold=threshold)  # refuses bad settings
        self.linear = linear.requires_grad_(False)
        self.temperature, self.budget, self.threshold = temperature, budget, threshold
        self.scale, self.renormalise = scale, renormalise
        self.keys = nn.ParameterList()
        self.values = nn.ParameterList()

    @property
    def ranks(self) -> int:
        """Experts in the pool."""
        return sum(len(key) for key in self.keys)

    def add_task(self, rank: int, generator: torch.Generator | None = None) -> None:
        """Freeze the pool and add `rank` experts: keys uniform in +-1/sqrt(d_in) (LoRA's), values zero, so that only gates move.

        Raises:
            ValueError: a rank below 1.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.requires_grad_(False)
        weight = self.linear.weight
        bound = weight.shape[1] ** -0.5
        key = torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device).uniform_(
            -bound, bound, generator=generator
        )
        self.keys.append(nn.Parameter(key))
        self.values.append(nn.Parameter(weight.new_zeros(weight.shape[0], rank)))

    def pool(self) -> tuple[Tensor, Tensor]:
        """All keys (R, d_in) and values (d_out, R), oldest task first.

        Raises:
            ValueError: no task was added.
        """
        if not len(self.keys):
            raise ValueError("the pool is empty: call add_task first")
        return torch.cat(list(self.keys)), torch.cat(list(self.values), dim=1)

    def gating(self) -> dict:
        """Arguments of `self_activated_gates` in the present mode."""
        threshold = None if self.training else self.threshold
        return dict(temperature=self.temperature, budget=self.budget, threshold=threshold, renormalise=self.renormalise)

    def gates(self, x: Tensor) -> Tensor:
        """Gate of every expert for inputs of shape (..., d_in): shape (..., R)."""
        return self_activated_gates(x @ self.pool()[0].mT, **self.gating())

    def forward(self, x: Tensor) -> Tensor:
        """Inputs of shape (..., d_in) to outputs of shape (..., d_out); the plain layer while the pool is empty."""
        y = self.linear(x)
        if not len(self.keys):
            return y
        update = mixture_of_ranks(x.reshape(-1, x.shape[-1]), *self.pool(), scale=self.scale, **self.gating())
        return y + update.reshape(y.shape)

    def active_parameters(self, x: Tensor) -> Tensor:
        """Adapter parameters of the experts that are active for each input, (d_in + d_out) each: int64, shape (...)."""
        return (self.gates(x) > 0).sum(-1) * sum(self.linear.weight.shape)

    @torch.no_grad()
    def drop(self, ranks: Tensor) -> None:
        """Remove experts from the pool for good.

        Args:
            ranks: which to remove, bool of shape (R,), such as `(layer.gates(x) > 0).any(0).logical_not()`.

        Raises:
            ValueError: not one bool for each expert.
        """
        if ranks.dtype != torch.bool or ranks.shape != (self.ranks,):
            raise ValueError(
                f"one bool for each of {self.ranks} experts is needed, got {ranks.dtype} of shape {tuple(ranks.shape)}"
            )
        kept = ranks.logical_not().split([len(key) for key in self.keys])
        pairs = [(key, value, keep) for key, value, keep in zip(self.keys, self.values, kept, strict=True) if keep.any()]
        self.keys = nn.ParameterList(nn.Parameter(key[keep], key.requires_grad) for key, _, keep in pairs)
        self.values = nn.ParameterList(nn.Parameter(value[:, keep], value.requires_grad) for _, value, keep in pairs)

    @torch.no_grad()
    def merge(self, gates: Tensor) -> nn.Linear:
        """The plain layer W0 + scale * B diag(gates) A: exact where every input has these gates, else an approximation.

        Args:
            gates: shape (R,), such as the mean of `gates(x)` over inputs that stand for those to come.

        Raises:
            ValueError: not one gate for each expert.
        """
        if gates.shape != (self.ranks,):
            raise ValueError(f"one gate for each of {self.ranks} experts is needed, got shape {tuple(gates.shape)}")
        keys, values = self.pool()
        d_out, d_in = self.linear.weight.shape
        bias = self.linear.bias
        merged = nn.Linear(d_in, d_out, bias is not None, device=keys.device, dtype=keys.dtype)
        merged.weight.copy_(self.linear.weight + self.scale * (values * gates) @ keys)
        if bias is not None:
            merged.bias.copy_(bias)
        return merged
