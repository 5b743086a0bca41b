"""The trained entries of one weight, at work on a model: dense weights are updated in place, NF4 weights never."""

import torch
from torch import Tensor, nn

from engine.sparse.base_weight import NF4Weight


class ActiveEntries:
    """The trained entries of one weight: where they are, what stood there, and what is added.

    `values` are fp32 (fp64 over an fp64 weight) whatever the weight is: bf16 rounds most small updates away. A dense
    weight holds round(base + values) at `indices` after `write_back`, and its own numbers bit for bit after `restore`.
    An NF4 weight is never written: whoever uses it adds the values where `applied` says so (`linear.rebuild_weight`).
    """

    def __init__(self, name: str, weight: nn.Parameter | NF4Weight, num_active: int) -> None:
        """Reserve `num_active` entries of `weight`; `place` says which.

        Args:
            name: of the parameter in the model.
            weight: any shape; contiguous where it is dense.
            num_active: 1 <= num_active <= weight.numel().
        """
        if isinstance(weight, nn.Parameter) and not weight.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        self.name = name
        self.weight = weight
        self.num_active = num_active
        self.applied = False  # whether the values count in the forward
        self.indices: Tensor | None = None  # (num_active,) sorted, unique
        self.base: Tensor | None = None  # (num_active,) the replaced entries of a dense weight, in its dtype
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(num_active, dtype=dtype, device=weight.device))

    def place(self, indices: Tensor) -> None:
        """Make the entries at `indices`, (num_active,), the trained ones; what stands there is kept as the base."""
        self.restore()
        self.indices = indices.to(self.weight.device)
        if isinstance(self.weight, nn.Parameter):
            self.base = self.weight.detach().view(-1).index_select(0, self.indices)

    @property
    def placed(self) -> Tensor:
        """The indices, (num_active,); an error before `place`."""
        assert self.indices is not None, f"the entries of {self.name} are not placed yet"
        return self.indices

    def gather(self, dense: Tensor) -> Tensor:
        """Return the entries of `dense` (shape of the weight) at `indices`, in the dtype of the values."""
        return dense.reshape(-1).index_select(0, self.placed.to(dense.device)).to(self.values)

    @torch.no_grad()
    def write_back(self) -> None:
        """Put round(base + values) into the weight, or let it count from now on.

        A weight that no gradient ever reached has no entries, and nothing happens.
        """
        if self.indices is None:
            return
        self.applied = True
        if isinstance(self.weight, nn.Parameter):
            assert self.base is not None, f"the entries of {self.name} are not placed yet"
            summed = (self.base.to(self.values.dtype) + self.values).to(self.weight.dtype)
            self.weight.detach().view(-1).index_copy_(0, self.placed.long(), summed)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the replaced entries back, bit for bit. Nothing happens before `place`."""
        self.applied = False
        if isinstance(self.weight, nn.Parameter) and self.indices is not None and self.base is not None:
            self.weight.detach().view(-1).index_copy_(0, self.indices.long(), self.base)
