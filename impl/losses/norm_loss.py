"""Norm loss (Georgiou, Schmitt, Bäck, Chen, Lew, 2021, arXiv 2103.06583): every unit's weights are pulled to length 1.

    L = lam sum_i (1 - |w_i|)^2                     w_i: the weights of one output unit or filter, flattened
    dL / dw_i = 2 lam (1 - 1 / |w_i|) w_i           decay where |w_i| > 1, growth where |w_i| < 1

in place of weight decay. Under normalisation the function does not depend on |w_i|, but a step of the size eta turns w_i by about
eta / |w_i|^2, which this holds still.
"""

import torch
from torch import Tensor, nn

__all__ = ["add_norm_loss_gradient_", "module_norm_loss", "norm_loss", "norm_loss_gradient", "unit_weights"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def norm_loss(weight: Tensor, target: float | Tensor = 1.0) -> Tensor:
    """sum_i (target - |w_i|)^2, a scalar; 16-bit weights are summed in float32.

    Args:
        weight: shape (units, ...), floating point.
        target: length of a row, or of each, shape (units,); 0 makes it the penalty of weight decay.

    Raises:
        ValueError: no floating point, fewer than two axes, or a target below 0.
    """
    return (target - _lengths(weight, target)).square().sum()


def norm_loss_gradient(weight: Tensor, target: float | Tensor = 1.0) -> Tensor:
    """Gradient of `norm_loss` in closed form, shape and dtype of the weights; 0 for a row of zeros.

    Raises:
        ValueError: as in `norm_loss`.
    """
    lengths = _lengths(weight, target)
    pull = torch.where(lengths > 0, 2 - 2 * target / lengths.where(lengths > 0, 1), 0)
    return (pull.view(-1, *[1] * (weight.ndim - 1)) * weight).to(weight.dtype)


def unit_weights(layer: nn.Module) -> Tensor:
    """Weights of a linear or convolutional layer as (units, ...), a view where they lie so; a transposed one is turned.

    Raises:
        TypeError: another kind of layer.
    """
    if not isinstance(layer, LAYERS):
        raise TypeError(f"norm loss is for linear and convolutional layers, got {type(layer).__name__}")
    if not getattr(layer, "transposed", False):
        return layer.weight
    return layer.weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def module_norm_loss(module: nn.Module, target: float = 1.0) -> Tensor:
    """Sum of `norm_loss` over all linear and convolutional layers of a module, a scalar; differentiable.

    Raises:
        ValueError: a module without such a layer, or a target below 0.
    """
    return sum(norm_loss(unit_weights(layer), target) for layer in _layers(module))


@torch.no_grad()
def add_norm_loss_gradient_(module: nn.Module, lam: float, target: float = 1.0) -> None:
    """Add lam times the gradient to every `weight.grad`, after `backward`: the same step without a graph.

    Raises:
        ValueError: as in `module_norm_loss`, or a weight without a gradient.
    """
    for layer in _layers(module):
        if layer.weight.grad is None:
            raise ValueError("a weight has no gradient: call backward first")
        gradient = norm_loss_gradient(unit_weights(layer), target)
        if getattr(layer, "transposed", False):
            gradient = gradient.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        layer.weight.grad.add_(gradient, alpha=lam)


def _layers(module: nn.Module) -> list[nn.Module]:
    layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
    if not layers:
        raise ValueError("the module has no linear or convolutional layer")
    return layers


def _lengths(weight: Tensor, target: float | Tensor) -> Tensor:
    """|w_i|, shape (units,), float32 at least."""
    if not weight.is_floating_point() or weight.ndim < 2:
        raise ValueError(f"weights are floating point (units, ...), got {weight.dtype} {tuple(weight.shape)}")
    if not (torch.as_tensor(target) >= 0).all():
        raise ValueError(f"the target is at least 0, got {target}")
    return torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
