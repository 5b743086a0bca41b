"""The trained entries of one weight, at work on a model: dense weights are updated in place, NF4 weights never."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.sparse.base_weight import NF4Weight


@dataclass(frozen=True)
class SettledEntries:
    """Entries that were trained and no longer are, but keep their change.

    `indices`: (n,) sorted, unique, none of them active; `values`: (n,); `base`: (n,) what stood in a dense weight. Over
    a dense weight, which holds the change already, they lie in main memory; over NF4 on its device.
    """

    indices: Tensor
    values: Tensor
    base: Tensor | None


class ActiveEntries:
    """The trained entries of one weight: where they are, what stood there, and what is added.

    `values` are fp32 (fp64 over an fp64 weight) whatever the weight is: bf16 rounds most small updates away. A dense
    weight holds round(base + values) at `indices` after `write_back`, and its own numbers bit for bit after `restore`.
    An NF4 weight is never written: whoever uses it adds the values where `applied` says so (`linear.rebuild_weight`).

    The trained entries may change in number and place: `place` starts anew, `move` keeps what was learnt.
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
        self.settled: SettledEntries | None = None
        self.applied = False  # whether the values count in the forward
        self.indices: Tensor | None = None  # (num_active,) sorted, unique
        self.base: Tensor | None = None  # (num_active,) the replaced entries of a dense weight, in its dtype
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(num_active, dtype=dtype, device=weight.device))

    @property
    def num_active(self) -> int:
        """Trained entries."""
        return self.values.numel()

    def place(self, indices: Tensor) -> None:
        """Make the entries at `indices`, (n,) sorted and unique, the trained ones; the weight is its base again.

        What stands there is kept. Where n is not `num_active`, there are n values from now on, all 0.
        """
        self.restore()
        self.settled = None
        self.indices = indices.to(self.weight.device)
        self.base = self._base_at(self.indices)
        if indices.numel() != self.num_active:
            self.values.data = self.values.data.new_zeros(indices.numel())

    def _base_at(self, indices: Tensor) -> Tensor | None:
        if not isinstance(self.weight, nn.Parameter):
            return None
        return self.weight.detach().view(-1).index_select(0, indices)

    @torch.no_grad()
    def move(self, indices: Tensor) -> Tensor:
        """Train the entries at `indices`, (n,) sorted and unique, from now on; those that leave keep their change.

        The weight stays as it is. An entry that was trained before goes on from its value, a new one starts at 0.

        Returns:
            (n,) int64: for each entry now, its place before, or -1 where it was not trained just before.
        """
        device = self.weight.device
        positions, values, base = self._changed()
        wanted, active = indices.long().to(device), self.placed.long()
        at, known = _find(positions, wanted)
        leaving = ~torch.isin(positions, wanted)
        fresh = self._base_at(wanted)
        if base is not None and fresh is not None:
            fresh = torch.where(known, base[at], fresh)
            base = base[leaving]
        self.settled = self._store(positions[leaving], values[leaving], base)
        self.indices, self.base = wanted.to(self.placed.dtype), fresh
        self.values.data = torch.where(known, values[at], 0.0)
        at, known = _find(active, wanted)
        return torch.where(known, at, -1)

    def settle(self, indices: Tensor, values: Tensor) -> None:
        """Let the entries at `indices`, (n,), which hold the base now, have the changes `values` untrained."""
        on_device = indices.to(self.weight.device)
        self.settled = self._store(on_device, values.to(self.values), self._base_at(on_device))

    def _store(self, indices: Tensor, values: Tensor, base: Tensor | None) -> SettledEntries:
        home = torch.device("cpu") if isinstance(self.weight, nn.Parameter) else self.weight.device
        indices = indices.to(home, self.placed.dtype)
        return SettledEntries(indices, values.to(home), None if base is None else base.to(home))

    def _changed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return positions (int64, sorted), values and base of all changed entries, on the device of the weight."""
        positions, values, base = self.placed.long(), self.values.detach(), self.base
        if self.settled is None:
            return positions, values, base
        device, settled = self.weight.device, self.settled
        positions, order = torch.cat((positions, settled.indices.to(device).long())).sort()
        values = torch.cat((values, settled.values.to(device)))[order]
        if base is not None and settled.base is not None:
            base = torch.cat((base, settled.base.to(device)))[order]
        return positions, values, base

    @torch.no_grad()
    def change(self) -> tuple[Tensor, Tensor]:
        """Return copies of indices and values of the whole change, settled entries included, on the CPU."""
        positions, values, _ = self._changed()
        return positions.to("cpu", self.placed.dtype, copy=True), values.to("cpu", copy=True)

    @property
    def placed(self) -> Tensor:
        """The indices, (num_active,); an error before `place`."""
        assert self.indices is not None, f"the entries of {self.name} are not placed yet"
        return self.indices

    def gather(self, dense: Tensor) -> Tensor:
        """Return the entries of `dense` (shape of the weight) at `indices`, in the dtype of the values."""
        return dense.reshape(-1).index_select(0, self.placed.to(dense.device)).to(self.values)

    def add_gradient(self, gathered: Tensor) -> None:
        """Add `gathered`, (num_active,), to the gradient of the values."""
        gathered = gathered.to(self.values)
        self.values.grad = gathered if self.values.grad is None else self.values.grad.add_(gathered)

    @torch.no_grad()
    def write_back(self) -> None:
        """Put round(base + values) into the weight, or let it count from now on.

        A weight that no gradient ever reached has no entries, and nothing happens.
        """
        if self.indices is None:
            return
        if isinstance(self.weight, nn.Parameter):
            assert self.base is not None, f"the entries of {self.name} are not placed yet"
            self._write(self.placed, self.base.to(self.values.dtype) + self.values)
            if not self.applied and self.settled is not None:
                assert self.settled.base is not None
                self._write(self.settled.indices, self.settled.base.to(self.values.dtype) + self.settled.values)
        self.applied = True

    def _write(self, indices: Tensor, entries: Tensor) -> None:
        flat = self.weight.detach().view(-1) if isinstance(self.weight, nn.Parameter) else None
        assert flat is not None, f"{self.name} is not dense"
        flat.index_copy_(0, indices.to(flat.device).long(), entries.to(flat.device, flat.dtype))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the replaced entries back, bit for bit. Nothing happens before `place`."""
        self.applied = False
        if self.indices is not None and self.base is not None:
            self._write(self.indices, self.base)
        if self.settled is not None and self.settled.base is not None:
            self._write(self.settled.indices, self.settled.base)


def _find(positions: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each of `wanted` stands in `positions` (sorted, at least one), and whether it does."""
    at = torch.searchsorted(positions, wanted).clamp(max=positions.numel() - 1)
    return at, positions[at] == wanted
