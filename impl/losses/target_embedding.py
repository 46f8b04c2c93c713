"""Targets in few dimensions (Rodriguez, Bautista, Gonzàlez, Escalera, 2018, arXiv 1806.10805) in place of one-hot vectors.

Every one of C classes has a code, a row of M (C, k) with k well below C. The network ends in k outputs, trained to lie near the
code of the right class, and predicts the class of the nearest one. Two kinds of codes:

    random projection       M_ij ~ N(0, 1 / k), or +-1 / sqrt(k)
    eigen-representation    L = I - D^(-1/2) S D^(-1/2) of the similarity S of classes, D its row sums; the k eigenvectors of the
                            smallest eigenvalues but the first, rows of length 1

(The text of the paper could not be read in full; the normalised Laplacian, and the similarity below, are a reconstruction.)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["class_similarity", "code_loss", "distortion_bound", "eigen_codes", "nearest_code", "random_codes"]


def random_codes(
    classes: int,
    k: int,
    *,
    signs: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normal codes, or with `signs` +-1 / sqrt(k), shape (classes, k): their squared distances have mean 2, as one-hot vectors'.

    Raises:
        ValueError: no class or no dimension.
    """
    if classes < 1 or k < 1:
        raise ValueError(f"codes need a class and a dimension at least, got {classes} and {k}")
    how = {"dtype": dtype, "device": device, "generator": generator}
    if not signs:
        return torch.randn(classes, k, **how) / k**0.5
    return torch.where(torch.rand(classes, k, **how) < 0.5, -1.0, 1.0).to(dtype or torch.get_default_dtype()) / k**0.5


def class_similarity(features: Tensor, targets: Tensor, classes: int) -> Tensor:
    """exp(-|m_i - m_j|^2 / s) of the classes' mean features, s the median of the squares; (classes, classes), diagonal 0.

    A class without a sample is as similar to the others as they are in the median. A class far from all others, by hundreds of
    medians, is similar to none, and `eigen_codes` refuses it.

    Args:
        features: shape (n, d), floating point, finite; 16-bit ones are compared in float32.
        targets: shape (n,), int64 in 0..classes-1.

    Raises:
        ValueError: shapes, dtypes or targets other than these, features that are not finite, or fewer than two classes with
            samples.
    """
    if features.ndim != 2 or not features.is_floating_point() or targets.shape != features.shape[:1]:
        raise ValueError(
            f"features are floating point (n, d) and targets (n,), got {features.dtype} {tuple(features.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError("features are not finite")
    if targets.dtype != torch.int64 or ((targets < 0) | (targets >= classes)).any():
        raise ValueError(f"targets are int64 in 0..{classes - 1}, got {targets.dtype}")
    wide = features.to(_wide(features))
    hot = F.one_hot(targets, classes).to(wide.dtype)
    counts = hot.sum(0)
    there = counts > 0
    if there.sum() < 2:
        raise ValueError("a similarity needs samples of two classes at least")
    means = hot.T @ wide / counts.clamp(min=1).unsqueeze(1)
    squares = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square()
    off = ~torch.eye(classes, dtype=torch.bool, device=features.device)
    scale = squares[off & there & there.unsqueeze(1)].median()
    squares = torch.where(there & there.unsqueeze(1), squares, scale)
    return (torch.where(scale > 0, torch.exp(-squares / scale.where(scale > 0, 1)), 1) * off).to(features.dtype)


def eigen_codes(similarity: Tensor, k: int) -> Tensor:
    """Codes of length 1 from the similarity of classes, shape (classes, k).

    Args:
        similarity: S, shape (classes, classes), symmetric, not negative, every row with an entry above 0 beside the diagonal.
        k: dimensions, from 1 to classes - 1.

    Raises:
        ValueError: a similarity or k other than these, or a class whose code is 0 (where classes fall into groups without any
            similarity between them, and k is too small to tell the groups apart).
    """
    n = len(similarity) if similarity.ndim == 2 else 0
    if similarity.shape != (n, n) or not similarity.is_floating_point() or not 1 <= k < n:
        raise ValueError(f"similarity is (classes, classes) with k below classes, got {tuple(similarity.shape)} and k = {k}")
    s = similarity.double().clone().fill_diagonal_(0)
    degrees = s.sum(1)
    if not torch.allclose(s, s.T) or (s < 0).any():
        raise ValueError("similarity is symmetric and not negative")
    if not (degrees > 0).all():
        raise ValueError(f"classes {(degrees <= 0).nonzero()[:, 0].tolist()} are similar to no other: merge or leave them out")
    laplacian = torch.eye(n, dtype=s.dtype, device=s.device) - s / (degrees * degrees.unsqueeze(1)).sqrt()
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, 1 : k + 1]
    if (vectors.norm(dim=1) < 1e-9).any():
        raise ValueError("a class gets no code: groups of classes have no similarity between them, take a larger k")
    return F.normalize(vectors, dim=1).to(similarity.dtype)


def code_loss(outputs: Tensor, targets: Tensor, codes: Tensor, *, form: str = "squared", reduction: str = "mean") -> Tensor:
    """Distance of outputs from the codes of their classes; 16-bit ones are compared in float32.

    Args:
        outputs: shape (..., k), floating point. (The cosine is steep at an output of 0, where it has no direction.)
        targets: shape (...), int64 in 0..classes-1.
        codes: shape (classes, k), dtype of the outputs.
        form: "squared", summed over the dimensions, or "cosine", 1 - cosine.
        reduction: "mean", "sum" or "none" over the samples.

    Returns:
        A scalar, or (...) for "none", float32 at least; NaN for the mean of nothing.

    Raises:
        ValueError: shapes, dtypes, targets, a form or a reduction other than these.
    """
    _check(outputs, codes)
    if targets.shape != outputs.shape[:-1] or targets.dtype != torch.int64 or ((targets < 0) | (targets >= len(codes))).any():
        raise ValueError(
            f"targets are int64 in 0..{len(codes) - 1}, {tuple(outputs.shape[:-1])}, got {targets.dtype} {tuple(targets.shape)}"
        )
    if form not in ("squared", "cosine") or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"form is 'squared' or 'cosine', reduction 'mean', 'sum' or 'none', got {form!r} and {reduction!r}")
    outputs, own = outputs.to(_wide(outputs)), codes[targets].to(_wide(outputs))
    losses = (outputs - own).square().sum(-1) if form == "squared" else 1 - F.cosine_similarity(outputs, own, dim=-1)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def nearest_code(outputs: Tensor, codes: Tensor) -> Tensor:
    """Class of the nearest code by Euclidean distance, int64 (...), for outputs (..., k); of ties the first.

    For codes of one length that is the code of the largest cosine.

    Raises:
        ValueError: outputs and codes (classes, k) of different dtypes or dimensions.
    """
    _check(outputs, codes)
    outputs, codes = outputs.to(_wide(outputs)), codes.to(_wide(outputs))
    return (2 * outputs @ codes.T - codes.square().sum(-1)).argmax(-1)


def distortion_bound(classes: int, k: int, eps: float) -> float:
    """Bound of the chance that any squared distance of normal codes leaves 2 (1 +- eps).

    C (C - 1) exp(-k (eps^2 / 4 - eps^3 / 6)), after Johnson and Lindenstrauss, by the tails of a chi-square and a union over the
    pairs; from 1 on it says nothing.

    Raises:
        ValueError: eps outside (0, 1).
    """
    if not 0 < eps < 1:
        raise ValueError(f"eps is in (0, 1), got {eps}")
    return classes * (classes - 1) * math.exp(-k * (eps**2 / 4 - eps**3 / 6))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(outputs: Tensor, codes: Tensor) -> None:
    alike = outputs.is_floating_point() and outputs.dtype == codes.dtype
    if not alike or codes.ndim != 2 or not len(codes) or outputs.shape[-1:] != codes.shape[1:]:
        raise ValueError(
            f"outputs (..., k) and codes (classes, k) share a floating-point dtype, got {outputs.dtype} {tuple(outputs.shape)} "
            f"and {codes.dtype} {tuple(codes.shape)}"
        )
