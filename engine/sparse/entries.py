"""The trained entries of one weight, at work on a model: dense weights are updated in place, NF4 weights never."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from engine.sparse.base_weight import NF4Weight
from engine.sparse.kernels import put
from engine.sparse.masters import Change, FloatValues, Numbers, SplitMasters, Step
from engine.sparse.positions import FlatPositions, Positions, pack_positions


@dataclass(frozen=True)
class SettledEntries:
    """Entries that were trained and no longer are, but keep their change.

    `positions`: n of them, none active; `values`: (n,); `base`: (n,) what stood in a dense weight. Over a dense weight,
    which holds the change already, they lie in main memory; over NF4 on its device.
    """

    positions: FlatPositions
    values: Tensor
    base: Tensor | None

    @property
    def indices(self) -> Tensor:
        """The flat positions, (n,) sorted and unique."""
        return self.positions.indices


class ActiveEntries:
    """The trained entries of one weight: where they are, what stood there, and what is added.

    The values are fp32 (fp64 over an fp64 weight) whatever the weight is: bf16 rounds most small updates away. A dense
    weight holds round(base + values) at the positions after `write_back`, and its own numbers bit for bit after
    `restore`. An NF4 weight is never written: whoever uses it adds the values where `applied` says so
    (`linear.rebuild_weight`).

    `values` is the parameter that optimizers know and that carries the gradient. Kept in little memory (`compact`) it
    may hold no numbers: `read_values` and `update_values` work either way.

    The trained entries may change in number and place: `place` starts anew, `move` keeps what was learnt.
    """

    def __init__(self, name: str, weight: nn.Parameter | NF4Weight, num_active: int, *, compact: bool = False) -> None:
        """Reserve `num_active` entries of `weight`; `place` says which.

        Args:
            name: of the parameter in the model.
            weight: any shape; contiguous where it is dense.
            num_active: 1 <= num_active <= weight.numel().
            compact: keep positions by rows (`positions.py`), and of a bf16 weight split masters (`masters.py`).
        """
        if isinstance(weight, nn.Parameter) and not weight.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        self.name = name
        self.weight = weight
        self.settled: SettledEntries | None = None
        self.applied = False  # whether the values count in the forward
        self.placement = 0
        """How often entries were placed or moved; what was worked out for a placement holds while this is the same."""
        self._compact = compact
        self._positions: Positions | None = None
        dense = weight if isinstance(weight, nn.Parameter) else None
        self._numbers: Numbers
        if compact and dense is not None and dense.dtype == torch.bfloat16:
            self._numbers = SplitMasters(dense, num_active)
        else:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self._numbers = FloatValues(dense, torch.zeros(num_active, dtype=dtype, device=weight.device))

    @property
    def values(self) -> nn.Parameter:
        """The trained parameter, (num_active,)."""
        return self._numbers.values

    @property
    def split(self) -> bool:
        """Whether `values` holds no numbers, so that an optimizer must read and write them here."""
        return isinstance(self._numbers, SplitMasters)

    @property
    def num_active(self) -> int:
        """Trained entries."""
        return self.values.numel()

    def place(self, indices: Tensor, values: Tensor | None = None) -> None:
        """Make the entries at `indices`, (n,) sorted and unique, the trained ones; the weight is its base again.

        What stands there is kept. `values`, (n,), are theirs from now on, all 0 where none are given; they count after
        `write_back`.
        """
        self.restore()
        self.settled = None
        indices = indices.to(self.weight.device)
        if values is None:
            values = self.values.new_zeros(indices.numel()).detach()
        self._begin(indices, self._base_at(indices), values.to(self.values))

    def _begin(self, indices: Tensor, base: Tensor | None, values: Tensor) -> None:
        self.placement += 1
        shape = self.weight.shape
        self._positions = pack_positions(indices, shape) if self._compact else FlatPositions(shape.numel(), indices)
        self._numbers.begin(base, values)

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
        active = self.placed
        positions, values, base = self._changed(active)
        wanted, dtype = indices.long().to(device), active.dtype
        at, known = _find(positions, wanted)
        leaving = ~torch.isin(positions, wanted)
        fresh = self._base_at(wanted)
        if base is not None and fresh is not None:
            fresh = torch.where(known, base[at], fresh)
            base = base[leaving]
        self.settled = self._store(positions[leaving].to(dtype), values[leaving], base)
        self._begin(wanted.to(dtype), fresh, torch.where(known, values[at], 0.0))
        at, known = _find(active.long(), wanted)
        return torch.where(known, at, -1)

    def settle(self, indices: Tensor, values: Tensor) -> None:
        """Let the entries at `indices`, (n,), which hold the base now, have the changes `values` untrained."""
        on_device = indices.to(self.weight.device)
        self.settled = self._store(on_device, values.to(self.values), self._base_at(on_device))

    def _store(self, indices: Tensor, values: Tensor, base: Tensor | None) -> SettledEntries:
        home = torch.device("cpu") if isinstance(self.weight, nn.Parameter) else self.weight.device
        positions = FlatPositions(self.weight.numel(), indices.to(home))
        return SettledEntries(positions, values.to(home), None if base is None else base.to(home))

    def _changed(self, placed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return positions (int64, sorted), values and base of all changed entries, on the device of the weight."""
        positions, values, base = placed.long(), self.read_values(), self.base
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
        placed = self.placed
        positions, values, _ = self._changed(placed)
        return positions.to("cpu", placed.dtype, copy=True), values.to("cpu", copy=True)

    @property
    def is_placed(self) -> bool:
        """Whether the entries are chosen."""
        return self._positions is not None

    @property
    def placed(self) -> Tensor:
        """The flat positions, (num_active,) sorted and unique; an error before `place`. Unpacked where `compact`."""
        return self.positions.flat()

    @property
    def positions(self) -> Positions:
        """The positions as they are kept; an error before `place`."""
        assert self._positions is not None, f"the entries of {self.name} are not placed yet"
        return self._positions

    @property
    def base(self) -> Tensor | None:
        """The entries of a dense base at the positions, (num_active,) in its dtype."""
        return self._numbers.base(self.positions)

    def read_values(self) -> Tensor:
        """Return the values, (num_active,); those of the parameter itself where it holds them."""
        return self._numbers.read(self.positions)

    def update_values(self, change: Change) -> None:
        """Let `change` work on the values, (num_active,), in place."""
        self._numbers.update(self.positions, change)

    def update_halves(self, step: Step) -> None:
        """Let `step` work on the halves of split masters; see `SplitMasters`."""
        assert isinstance(self._numbers, SplitMasters), f"the values of {self.name} are not split"
        self._numbers.update_halves(self.positions, step)

    def gather(self, dense: Tensor) -> Tensor:
        """Return the entries of `dense` (shape of the weight) at the positions, in the dtype of the values."""
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
        if self._positions is None:
            return
        if isinstance(self.weight, nn.Parameter):
            self._numbers.apply(self._positions)
            if not self.applied and self.settled is not None:
                assert self.settled.base is not None
                self._write_settled(self.settled.indices, self.settled.base + self.settled.values)
        self.applied = True

    def _write_settled(self, indices: Tensor, entries: Tensor) -> None:
        assert isinstance(self.weight, nn.Parameter), f"{self.name} is not dense"
        put(self.weight.detach().view(-1), indices.to(self.weight.device), entries.to(self.weight.device))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the replaced entries back, bit for bit. Nothing happens before `place`."""
        self.applied = False
        if self._positions is not None:
            self._numbers.remove(self._positions)
        if self.settled is not None and self.settled.base is not None:
            self._write_settled(self.settled.indices, self.settled.base)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs, without the name of the weight."""
        found = {}
        if self._positions is not None:
            found = {"indices": self.placed, "values": self.read_values()}
        if self.settled is not None:
            found |= {"settled_indices": self.settled.indices, "settled_values": self.settled.values}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave; the values count after `write_back`."""
        if "indices" in state:
            self.place(state["indices"], state["values"])
        if "settled_indices" in state:
            self.settle(state["settled_indices"], state["settled_values"])

    def resident(self) -> Iterator[tuple[Literal["values", "indices"], Tensor]]:
        """Yield the tensors that stay between two steps, each with its part of the plan."""
        yield from (("values", tensor) for tensor in self._numbers.tensors)
        if self._positions is not None:
            yield from (("indices", tensor) for tensor in self._positions.tensors)


def _find(positions: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each of `wanted` stands in `positions` (sorted, at least one), and whether it does."""
    at = torch.searchsorted(positions, wanted).clamp(max=positions.numel() - 1)
    return at, positions[at] == wanted
