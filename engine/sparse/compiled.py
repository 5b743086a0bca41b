"""AdamW's update with 8-bit states as one function of one weight's entries, of which torch.compile makes a few kernels.

Step by step the update goes over its numbers some thirty times: decoding, moments, step, rounding, encoding. On a GPU
each is a kernel of its own; compiled, what there is of an entry is read and written once. On a CPU torch's fused AdamW
and bitsandbytes' decoding do well enough, so that nothing is compiled there unless it is asked for. Where there is no
compiler, the same function runs as it stands.

Codes, values and weights are those of the step by step way up to the rounding of fp32, so that a code may be the one
beside it. How masters are split is exact either way.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sparse.adamw import aged_update, even_update
from engine.sparse.blockwise import CodeTables, code_tables, decode, encode
from engine.sparse.compiling import Compiled
from engine.sparse.masters import join, split
from engine.sparse.states import SCALES, SIGNED, Moments

Numbers = tuple[Tensor, ...]  # the values; or high and low halves of masters and base entries
States = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What is the same in every update, so that it is compiled in."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


def coded_update(
    numbers: Numbers,
    grad: Tensor,
    packed: States,
    tables: Mapping[str, CodeTables],
    rate: Tensor,
    corrections: tuple[Tensor, Tensor] | None,
    settings: Settings,
) -> tuple[Numbers, States]:
    """Return the numbers of a weight's entries after an update, and their states; nothing is changed in place.

    Args:
        numbers: (num_active,) fp32 values, or halves and base entries: then the new halves are returned.
        grad: (num_active,) fp32.
        packed: moments as codes with scales, and age, as `StateStore` keeps them.
        tables: of the codes of each moment.
        rate: a number.
        corrections: of the bias, where all entries are of one age (`adamw.even_update`); else None.
        settings: of AdamW.
    """
    values = numbers[0] if len(numbers) == 1 else join(numbers[0], numbers[1]) - numbers[2].float()
    first, second = (decode(packed[name], packed[name + SCALES], tables[name]) for name in SIGNED)
    moments = Moments(first, second, packed["age"].clone())
    if corrections is None:
        values = values - rate * aged_update(values, grad, moments, settings.betas, settings.eps)
        values = values - rate * settings.weight_decay * values
    else:
        moments.age.add_(1)
        values = values - rate * settings.weight_decay * values
        values = values - rate * even_update(grad, moments, settings.betas, corrections, settings.eps)
    states = {"age": moments.age}
    for name, moment in zip(SIGNED, (moments.exp_avg, moments.exp_avg_sq), strict=True):
        states[name], states[name + SCALES] = encode(moment, tables[name])
    return (values,) if len(numbers) == 1 else split(values + numbers[2].float()), states


class CompiledUpdate:
    """`coded_update` compiled."""

    def __init__(self) -> None:
        """Compile nothing yet."""
        self._run = Compiled(coded_update, "The update of the trained entries", dynamic=True)

    def __call__(
        self, numbers: Numbers, grad: Tensor, packed: States, rate: float, settings: Settings
    ) -> tuple[Numbers, States]:
        """See `coded_update`."""
        device, age, corrections = grad.device, packed["age"], None
        if not age.dim():
            first, second = (1 - beta ** (age.double() + 1) for beta in settings.betas)
            corrections = first.to(grad.dtype), second.to(grad.dtype)
        tables = {name: code_tables(signed, device) for name, signed in SIGNED.items()}
        at = torch.full((), rate, device=device)
        return self._run(numbers, grad, packed, tables, at, corrections, settings)
