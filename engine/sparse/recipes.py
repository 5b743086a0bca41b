"""How a tensor is made again in the backward, so that the forward need not keep it.

A linear layer keeps its input for the gradient of its weight. Where that input is a norm's output, or the gated
product of an MLP, it follows element by element from tensors that are kept anyway. Whoever makes such a tensor gives it
a recipe (`give_recipe`); whoever wants it in the backward asks `recipe_of`, saves the recipe's inputs instead, and has
`Again` make it when the backward is there. A tensor without a recipe is its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
_RECIPE = "_sparse_recipe"  # attribute of a tensor


class Again:
    """Makes tensors again, once for all who read them: at the first reading, until the last.

    It holds none of the inputs: readers save those, each for its own backward, so that autograd frees them in its turn
    and checkpointing may make them again as well.
    """

    def __init__(self, make: Callable[..., Tensors], source: "Again | None") -> None:
        """Prepare; `make` takes what `source` reads, or without one the inputs, and runs without gradients."""
        self._make, self._source = make, source
        self._made: Tensors | None = None
        self._readers = self._left = 0

    def add_reader(self) -> None:
        """Count one more who will read."""
        if self._source is not None and not self._readers:
            self._source.add_reader()
        self._readers += 1

    def read(self, inputs: Tensors) -> Tensors:
        """Return what is made of `inputs`; call it once a reader and backward."""
        if self._made is None:
            with torch.no_grad():
                self._made = self._make(*read_back(self._source, inputs))
            self._left = self._readers
        made = self._made
        self._left -= 1
        if not self._left:
            self._made = None
        return made


class Recipe(NamedTuple):
    """What to save of tensors that are wanted in the backward, and what makes them of it; None: they are saved."""

    inputs: Tensors
    again: Again | None = None

    def then(self, make: Callable[..., Tensors]) -> "Recipe":
        """Return the recipe of what `make` gives of the tensors of this one."""
        return Recipe(self.inputs, Again(make, self.again))

    def reading(self) -> "Recipe":
        """Return itself for one more reader, who saves `inputs` and calls `read_back` with them once a backward."""
        if self.again is not None:
            self.again.add_reader()
        return self


def recipe_of(*tensors: Tensor) -> Recipe:
    """Return how `tensors`, which were made together, are had in the backward: by their recipe, else by saving them."""
    found: Recipe | None = getattr(tensors[0], _RECIPE, None)
    return Recipe(tensors) if found is None else found


def give_recipe(recipe: Recipe, *tensors: Tensor) -> None:
    """Say that `tensors`, all that the recipe makes and in its order, can be made again."""
    for tensor in tensors:
        setattr(tensor, _RECIPE, recipe)


def read_back(again: Again | None, saved: Tensors) -> Tensors:
    """Return the tensors of a recipe from what was saved for it."""
    return saved if again is None else again.read(saved)
