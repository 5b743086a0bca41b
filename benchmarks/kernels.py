"""The project's own kernels beside their plain forms, on one weight: rows of `benchmarks.speed` on a CUDA device."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.subjects import DENSITY, Lab, Make, Size, Subject, clustered_mask
from engine.sparse import kernels
from engine.sparse.base_weight import NF4Weight, quantise_nf4
from engine.sparse.gradient_costs import costs_for
from engine.sparse.gradient_ways import Way, Workspace, plan_gradient, values_gradients
from engine.sparse.positions import FlatPositions
from engine.sparse.selection import select_topk_indices

SAMPLED_DENSITY = 0.001  # sampled products are for few entries
REPEATS = 20  # in what is timed as a step


def sampling_makers(lab: Lab) -> dict[str, Make]:
    """Return what makes the gradient of a few entries of a weight as sampled products: plain, and the kernel."""
    size, device = lab.size, torch.device(lab.size.device)

    def make(name: str, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Subject:
        grad_y, x = (torch.randn(size.tokens, width, device=device).to(size.dtype) for width in (size.ffn, size.width))
        positions = _positions(size, SAMPLED_DENSITY)
        return _repeated(name, size, lambda: form(grad_y, x, positions))

    forms = {"sampled products, plain": kernels.plain_products}
    if kernels.samples_by_kernel(device, size.dtype):
        forms["sampled products, kernel"] = kernels.sampled_products
    return {name: partial(make, name, form) for name, form in forms.items()}


def compaction_makers(lab: Lab) -> dict[str, Make]:
    """Return what makes the gradient of clustered entries of a weight: by the dense product and compacted."""
    size, device = lab.size, torch.device(lab.size.device)
    shape = size.ffn, size.width
    costs = costs_for(device, size.dtype, size.ffn * size.width)

    def make(name: str, way: Way) -> Subject:
        grad_y, x = (torch.randn(size.tokens, width, device=device).to(size.dtype) for width in shape)
        count = round(DENSITY * size.ffn * size.width)
        mask = clustered_mask(shape, count, 1.0, torch.Generator(device).manual_seed(0))
        plan = plan_gradient([mask], shape, size.tokens, costs, way)
        workspace = Workspace()
        made = _repeated(name, size, lambda: values_gradients(grad_y, x, plan, [mask], workspace)[0])
        return replace(made, share=plan.multiplied / (size.ffn * size.width))

    forms: dict[str, Way] = {"dense product": "dense", "compaction of it": "compaction"}
    return {name: partial(make, name, way) for name, way in forms.items()}


def rebuilding_makers(lab: Lab) -> dict[str, Make]:
    """Return what makes an NF4 weight dense with some entries changed: plain, and the kernel."""
    size, device = lab.size, torch.device(lab.size.device)

    def make(name: str, form: Callable[[NF4Weight, Sequence[kernels.Change], torch.dtype], Tensor]) -> Subject:
        weight = quantise_nf4(torch.randn(size.ffn, size.width, device=device).to(size.dtype))
        positions = FlatPositions(weight.numel(), _positions(size, DENSITY))
        changes = [(positions, torch.randn(positions.indices.numel(), device=device))]
        return _repeated(name, size, lambda: form(weight, changes, size.dtype))

    forms = {"NF4 rebuilt, plain": kernels.plain_rebuild}
    if kernels.rebuilds_by_kernel(device, size.dtype):
        forms["NF4 rebuilt, kernel"] = kernels.rebuild_nf4
    return {name: partial(make, name, form) for name, form in forms.items()}


def _positions(size: Size, density: float) -> Tensor:
    scores = torch.rand(size.ffn, size.width, device=size.device)
    return select_topk_indices(scores, round(density * scores.numel()))


def _repeated(name: str, size: Size, work: Callable[[], Tensor]) -> Subject:
    """Return a subject without a model, whose step does `work` often enough to be timed."""

    def step() -> None:
        for _ in range(REPEATS):
            work()

    return Subject(name, nn.Identity(), step, str(size.dtype).removeprefix("torch."))
