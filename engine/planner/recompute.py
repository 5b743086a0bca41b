"""How little a backward may find kept: for which families that is known, and the steps from all to next to nothing.

From one step to the next a run keeps less and computes more again:

nothing: all that the model's own forward keeps.
elementwise: norm outputs and activation products are made again from what is kept anyway, for a few passes over them.
mlp: in the first `recompute_blocks` blocks the products with gate and up are computed again as well.
blocks: the first `recompute_blocks` blocks keep their input alone; all others but the last are as under mlp.

The first blocks are those whose backward comes last, when all that the others kept is gone. mlp comes before blocks, as
it costs fewer multiplications a byte: 2 d f for 2 f numbers, against 4 d^2 + 3 d f and the attention for 5 d + 2 f.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from engine.errors import InvalidSpecError, SpecProblem
from engine.spec import SPARSE, RunSpec

Recompute = Literal["nothing", "elementwise", "mlp", "blocks"]

# Families whose norms and MLPs `engine.sparse.recompute` knows. Compared with the model's own forward class by class.
KNOWN_FAMILIES = frozenset(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"))


@dataclass(frozen=True)
class Kept:
    """What one block keeps for its backward.

    `lean`: norm outputs and activation products are made again; `gates`: what enters the product is kept;
    `inside`: anything but the block's input is kept.
    """

    lean: bool = False
    gates: bool = True
    inside: bool = True


_KEPT = lru_cache(maxsize=None)(Kept)  # few; the same ones are quick to compare


def kept_by_block(spec: RunSpec, family: str, blocks: int) -> tuple[Kept, ...]:
    """Return what each block keeps; `spec.recompute` is not auto.

    Args:
        spec: of the run.
        family: the config's model_type.
        blocks: of the model.
    """
    lean = spec.recompute != "nothing" and spec.method in SPARSE and family in KNOWN_FAMILIES
    count = blocks if spec.recompute_blocks is None else min(spec.recompute_blocks, blocks)
    # The backward begins with the last block, while all others have what they kept: its gates may as well be there.
    recomputed = count if spec.recompute == "mlp" else blocks - 1 if spec.recompute == "blocks" else 0
    checkpointed = blocks if spec.gradient_checkpointing else count if spec.recompute == "blocks" else 0
    return _kept(lean, recomputed, checkpointed, blocks)


@lru_cache(maxsize=512)
def _kept(lean: bool, recomputed: int, checkpointed: int, blocks: int) -> tuple[Kept, ...]:
    return tuple(
        # A block that is computed anew as a whole keeps its gates while it is there.
        _KEPT(lean, not lean or layer < checkpointed or layer >= recomputed, layer >= checkpointed)
        for layer in range(blocks)
    )


def words(kept: Sequence[Kept]) -> str:
    """Return what the backward makes again; empty where that is nothing."""
    gates = sum(not each.gates for each in kept)
    blocks = sum(not each.inside for each in kept)
    found = ["norm outputs, activation products"] if any(each.lean for each in kept) else []
    found += [f"gate and up in {gates} of {len(kept)} blocks"] if gates else []
    found += [f"{blocks} of {len(kept)} blocks as a whole"] if blocks else []
    return ", ".join(found)


def choices(spec: RunSpec, family: str, blocks: int) -> Iterator[tuple[Recompute, int | None]]:
    """Yield the steps open to a run, from all that is kept to the least.

    The last block's backward comes first: to recompute it too saves something only where the peak comes before it.
    """
    yield "nothing", None
    if spec.method in SPARSE and family in KNOWN_FAMILIES:
        yield "elementwise", None
        yield from (("mlp", count) for count in range(1, blocks))
    if not spec.gradient_checkpointing:
        yield from (("blocks", count) for count in range(1, blocks + 1))


def resolved(spec: RunSpec, family: str, blocks: int, fits: Callable[[RunSpec], bool]) -> RunSpec:
    """Return `spec` with `recompute: auto` replaced by the first step that fits, or the last one where none does.

    Args:
        spec: as asked.
        family: the config's model_type.
        blocks: of the model.
        fits: whether a spec fits its budget; what keeps less fits where one fits that keeps more.

    Raises:
        InvalidSpecError: the model has fewer blocks than are to be recomputed.
    """
    if (spec.recompute_blocks or 0) > blocks:
        said = f"recompute_blocks must be at most {blocks}, the blocks of the model, got {spec.recompute_blocks}."
        raise InvalidSpecError([SpecProblem("recompute_blocks", f"{said} Lower it, or leave it empty for all.")])
    if spec.recompute != "auto":
        return spec
    steps = [*choices(spec, family, blocks)]

    def taken(place: int) -> RunSpec:
        level, count = steps[place]
        return spec.model_copy(update={"recompute": level, "recompute_blocks": count})

    low, high = 0, len(steps) - 1
    if fits(taken(low)):  # what most runs do
        return taken(low)
    if not fits(taken(high)):
        return taken(high)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(taken(middle)) else (middle + 1, high)
    return taken(low)
