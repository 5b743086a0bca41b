"""How sparse the gradient is, and how much of it the trained entries catch (arXiv:2312.11875, Figures 3d and 4)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from engine.sparse.entries import ActiveEntries
from engine.sparse.selection import squared_norms_of_top

TOP_FRACTION = 0.01  # Figure 3d: the top 1 percent


@dataclass(frozen=True)
class GradientShares:
    """Shares of the squared gradient norm, each in [0, 1]."""

    top: float
    selected: float
    best: float


@dataclass
class GradientProbe:
    """Measures the dense gradients of one backward, one weight at a time, as the hooks hand them over.

    The choice is per weight, as the method's is; `overall` weighs the weights by their squared norms.
    """

    _norms: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)

    def observe(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Take in the dense gradient of one weight whose entries are placed."""
        squares = grad.flatten().to(entry.values.dtype).square()
        counts = sorted({max(1, int(TOP_FRACTION * grad.numel())), entry.num_active})
        norms = dict(zip(counts, squared_norms_of_top(squares, counts), strict=True))
        selected = float(squares.index_select(0, entry.placed).sum())
        top = norms[max(1, int(TOP_FRACTION * grad.numel()))]
        self._norms[entry.name] = (float(squares.sum()), top, selected, norms[entry.num_active])

    @property
    def tensors(self) -> Mapping[str, GradientShares]:
        """The shares of each weight by parameter name."""
        return {name: _shares(norms) for name, norms in self._norms.items()}

    @property
    def overall(self) -> GradientShares:
        """The shares over all weights together."""
        total, top, selected, best = (sum(column) for column in zip(*self._norms.values(), strict=True))
        return _shares((total, top, selected, best))

    def __bool__(self) -> bool:
        """Whether anything was observed."""
        return bool(self._norms)


def _shares(norms: tuple[float, float, float, float]) -> GradientShares:
    total, top, selected, best = norms
    if total == 0.0:
        return GradientShares(0.0, 0.0, 0.0)
    return GradientShares(top / total, selected / total, max(best, selected) / total)
