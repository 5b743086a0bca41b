"""Frozen norms: the model's own numbers, compiled and not."""

import shutil
from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.sparse.norms import GRADIENT, NORMED, SCALED, FrozenNorm, Norm, norm_gradient, normed, scaled

DTYPES = (torch.float32, torch.bfloat16)


def _inputs(dtype: torch.dtype, tokens: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    return (3 * torch.randn(2, tokens, 64)).to(dtype), torch.randn(2, tokens, 64).to(dtype), torch.randn(64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True], ids=["llama", "gemma"])
def test_a_norm_is_that_of_the_model(wide: bool, dtype: torch.dtype) -> None:
    x, grad_y, weight = _inputs(dtype)
    own: nn.Module = GemmaRMSNorm(64, 1e-5) if wide else LlamaRMSNorm(64, 1e-5)
    own.weight = nn.Parameter(weight, requires_grad=False)
    expected, found = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, root = Norm.apply(found, FrozenNorm(weight, 1e-5, wide))  # type: ignore[no-untyped-call]
    assert torch.equal(y, own(expected))
    assert root.shape == (2, 20, 1)
    (own(expected) * grad_y).sum().backward()
    (y * grad_y).sum().backward()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.grad, expected.grad, rtol=4 * rounding, atol=4 * rounding)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_compiled_in_16_bit_it_gives_the_same_numbers_also_in_another_thread() -> None:
    """As in a backward on a GPU, which runs in a thread of its own; the forward has the bits of the plain form."""
    x, grad_y, weight = _inputs(torch.bfloat16)
    y, root = NORMED(x, weight, 1e-5, False)
    assert torch.equal(y, normed(x, weight, 1e-5, False)[0])
    found = []

    def backward() -> None:
        found.append(SCALED(x, root, weight, False))
        found.append(GRADIENT(grad_y, x, root, weight, False))

    thread = Thread(target=backward)
    thread.start()
    thread.join()
    assert torch.equal(found[0], scaled(x, root, weight, False))
    torch.testing.assert_close(found[1], norm_gradient(grad_y, x, root, weight, False), rtol=2**-7, atol=1e-6)
