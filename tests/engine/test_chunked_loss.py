"""The loss in chunks is the plain loss: value, gradients, every family that the planner takes for known."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import engine.chunked_loss
from engine.chunked_loss import ChunkedCrossEntropy, OutputLayer, output_layer
from engine.data.batches import Batch
from engine.evaluate import causal_loss
from engine.planner.output_layer import CHUNK_ENTRIES, CHUNKED_FAMILIES, chunk_tokens

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = ("mixtral", "qwen3_moe")  # their grouped products have no fp64 on the CPU


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.chunked_loss, "chunk_tokens", lambda vocabulary: 5)


def _model(family: str, **fields: Any) -> PreTrainedModel:
    dtype = torch.float32 if family in EXPERTS else torch.float64
    config = AutoConfig.for_model(family, **{**SMALL, **fields})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model


def _batch(ignored: bool = False) -> Batch:
    ids = torch.randint(0, SMALL["vocab_size"], (3, 12))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :4], labels[1, 7:], mask[1, 7:] = -100, -100, 0
    if ignored:
        labels[:] = -100
    return Batch(ids, labels, mask, int((labels[:, 1:] != -100).sum()))


def _both(model: PreTrainedModel, batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return the plain loss and the loss in chunks, and the gradients of both by parameter."""
    losses, grads = [], []
    for chunks in (None, output_layer(model)):
        loss = causal_loss(model, batch, max(1, batch.labelled_tokens), CPU, chunks)
        model.zero_grad(set_to_none=True)
        loss.backward()
        losses.append(loss.detach())
        grads.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    return losses, grads


@pytest.mark.parametrize("family", sorted(CHUNKED_FAMILIES))
def test_value_and_gradients_are_those_of_the_plain_loss(family: str) -> None:
    model = _model(family)
    assert output_layer(model) is not None
    losses, grads = _both(model, _batch())
    tolerance = 1e-5 if family in EXPERTS else 1e-12
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trained", ["body", "head"])
def test_a_trained_head_or_embedding_gets_its_gradient(tied: bool, trained: str) -> None:
    model = _model("qwen3", tie_word_embeddings=tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(("embed" in name or "lm_head" in name) == (trained == "head"))
    _, (plain, chunked) = _both(model, _batch())
    assert plain.keys() == chunked.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(chunked[name], grad, rtol=1e-12, atol=1e-12)


def test_without_a_labelled_token_the_loss_is_zero_and_so_are_the_gradients() -> None:
    losses, (_, chunked) = _both(_model("llama"), _batch(ignored=True))
    assert losses[1] == 0
    assert all(not grad.any() for grad in chunked.values())


def test_the_function_passes_gradcheck() -> None:
    hidden, weight, bias = (
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((7, 6), (11, 6), (11,))
    )
    labels = torch.randint(0, 11, (7,))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer = OutputLayer(weight, bias, cap=2.0, divisor=1.5, factor=0.7)
        found: Tensor = ChunkedCrossEntropy.apply(hidden, weight, bias, labels, layer)
        return found

    def once(*inputs: Tensor) -> Tensor:  # gradcheck goes back through one graph many times
        value = loss(*inputs)
        grads = torch.autograd.grad(value, inputs)
        return value.detach() + sum(((x - x.detach()) * g).sum() for x, g in zip(inputs, grads, strict=True))

    assert torch.autograd.gradcheck(once, (hidden, weight, bias))


def test_in_bfloat16_it_is_no_worse_than_the_plain_loss() -> None:
    model, batch = _model("llama", vocab_size=80), _batch()
    _, (truth, _) = _both(model, batch)
    _, halves = _both(model.to(torch.bfloat16), batch)
    errors = [sum(float((grads[n].double() - truth[n]).square().sum()) for n in truth) ** 0.5 for grads in halves]
    assert errors[1] <= 1.1 * errors[0]


def test_a_layer_that_is_not_plain_takes_the_plain_loss() -> None:
    model = _model("llama")
    model.config.model_type = "novel"
    assert output_layer(model) is None
    model.config.model_type = "llama"
    model.lm_head.forward = lambda x: x
    assert output_layer(model) is None


@pytest.mark.parametrize(("vocabulary", "tokens"), [(32_000, 512), (128_256, 128), (151_936, 110), (2**25, 1)])
def test_a_chunk_holds_so_many_tokens(vocabulary: int, tokens: int) -> None:
    assert chunk_tokens(vocabulary) == tokens
    assert tokens == 1 or tokens * vocabulary <= CHUNK_ENTRIES


IN_THE_INTERPRETER = """
import torch
from engine.chunked_loss import losses_agree
assert losses_agree(torch.device("cpu"), torch.float32)
"""


def test_kernels_of_liger_give_the_same_loss_and_gradients() -> None:
    """They run on the CPU by Triton's interpreter, in a process of its own: it is chosen when they are imported."""
    pytest.importorskip("liger_kernel", reason="Liger-Kernel is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
