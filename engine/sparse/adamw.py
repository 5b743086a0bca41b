"""AdamW's formulas for entries of different ages and of one age, as plain functions of tensors."""

import torch
from torch import Tensor

from engine.sparse.states import Moments


def aged_update(values: Tensor, grad: Tensor, moments: Moments, betas: tuple[float, float], eps: float) -> Tensor:
    """Return what AdamW takes from each entry at a rate of 1, and bring its moments and age up to date, in place.

    m (sqrt(1 - b2^age)) / ((sqrt(v) + eps) (1 - b1^age)), as published with SpIEL (arXiv:2401.16405).

    Args:
        values: (num_active,); their dtype is computed in.
        grad: (num_active,).
        moments: of the entries, with the age of each.
        betas: b1, b2.
        eps: added to the root.
    """
    beta1, beta2 = betas
    moments.age.add_(moments.age < torch.iinfo(moments.age.dtype).max)
    _accumulate(grad, moments, betas)
    age = moments.age.to(values.dtype)
    denominator = (moments.exp_avg_sq.sqrt() + eps) * (1 - beta1**age)
    return moments.exp_avg * (1 - beta2**age).sqrt() / denominator


def even_update(
    grad: Tensor, moments: Moments, betas: tuple[float, float], corrections: tuple[Tensor, Tensor], eps: float
) -> Tensor:
    """Return what torch's AdamW takes from entries of one age at a rate of 1, and bring the moments up to date.

    (m / c1) / (sqrt(v) / sqrt(c2) + eps). Beside `aged_update` eps is scaled otherwise.

    Args:
        grad: (num_active,).
        moments: of the entries; the age stays as it is.
        betas: b1, b2.
        corrections: 1 - b1^age and 1 - b2^age after this update, a number each.
        eps: added to the root.
    """
    _accumulate(grad, moments, betas)
    denominator = moments.exp_avg_sq.sqrt() / corrections[1].sqrt() + eps
    return moments.exp_avg / corrections[0] / denominator


def _accumulate(grad: Tensor, moments: Moments, betas: tuple[float, float]) -> None:
    moments.exp_avg.lerp_(grad, 1 - betas[0])
    moments.exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
