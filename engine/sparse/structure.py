"""Choosing whole columns, or rows times columns, instead of entries: a little less of the gradient, for far less work.

Of whole input columns C the gradient is g.T @ x[:, C], one small product; of rows R times columns C it is
g[:, R].T @ x[:, C]. The number of entries stays what was asked for: what is left of it after the last whole column goes
to the best entries of the next one.
"""

import math

import torch
from torch import Tensor

from engine.sparse.selection import index_dtype
from engine.spec import Structure

ROUNDS = 3  # of choosing rows by the columns chosen and columns by the rows; the choice settles after two or three


def select_structured_indices(
    scores: Tensor, count: int, structure: Structure, *, norm: float = 2.0, largest: bool = True
) -> Tensor:
    """Return `count` flat positions in the columns, or rows and columns, of the largest norms of `scores`.

    Args:
        scores: any shape; one of other than two dimensions is seen as a matrix whose columns are its last dimension.
        count: positions to return, 1 <= count <= scores.numel().
        structure: `columns` or `rows_x_columns`. Of the latter as large a share of the rows is taken as of the columns.
        norm: which norm of a row or column ranks it: 2 for gradients and weights, 1 for scores that are squares.
        largest: whether the largest or the smallest are taken.

    Returns:
        (count,) sorted and unique; int32 if scores.numel() < 2**31, else int64.
    """
    matrix = scores.reshape(-1, scores.shape[-1]) if scores.dim() > 1 else scores.reshape(1, -1)

    def rank(part: Tensor, dim: int) -> Tensor:
        dtype = torch.promote_types(part.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(part, norm, dim=dim, dtype=dtype)
        return norms.argsort(descending=largest, stable=True)

    rows = torch.arange(len(matrix), device=scores.device)
    columns = rank(matrix, 0)
    if structure == "rows_x_columns":
        height = _height((matrix.shape[0], matrix.shape[1]), count)
        for _ in range(ROUNDS):
            rows = rank(matrix[:, columns[: -(-count // height)]], 1)[:height]
            columns = rank(matrix[rows], 0)
    whole, rest = divmod(count, len(rows))
    if rest:
        order = matrix[rows, columns[whole]].abs().argsort(descending=largest, stable=True)
        rows = rows[order]
    return _positions(rows, columns, count, matrix.shape[1]).to(index_dtype(scores.numel()))


def select_random_structured_indices(
    shape: tuple[int, ...], count: int, structure: Structure, generator: torch.Generator
) -> Tensor:
    """Return `count` flat positions in columns, or rows and columns, drawn at random; see `select_structured_indices`.

    Args:
        shape: of the weight.
        count: positions to return.
        structure: `columns` or `rows_x_columns`.
        generator: on the CPU, so that every device draws the same.
    """
    width = shape[-1]
    rows = torch.randperm(torch.Size(shape).numel() // width, generator=generator)
    if structure == "rows_x_columns":
        rows = rows[: _height((len(rows), width), count)]
    positions = _positions(rows, torch.randperm(width, generator=generator), count, width)
    return positions.to(index_dtype(torch.Size(shape).numel()))


def _height(shape: tuple[int, int], count: int) -> int:
    """Return how many rows to take: the same share of the rows as of the columns, and enough for `count` entries."""
    share = math.sqrt(count / (shape[0] * shape[1]))
    return min(shape[0], max(round(share * shape[0]), -(-count // shape[1])))


def _positions(rows: Tensor, columns: Tensor, count: int, width: int) -> Tensor:
    """Return the first `count` positions of `rows` times `columns`, column by column, sorted."""
    whole, rest = divmod(count, len(rows))
    taken = [(rows.view(-1, 1) * width + columns[:whole]).flatten()]
    if rest:
        taken.append(rows[:rest] * width + columns[whole])
    return torch.cat(taken).sort().values
