"""The cross-entropy in chunks of tokens: the logits of all tokens never exist.

A model of 128 K words has 0.5 MiB of fp32 logits a token, and its loss holds three such tensors. Here the output layer
and the loss are one function: for each chunk of tokens it makes the logits, their loss and at once their gradient, and
keeps of it the gradient of the hidden states (Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989, section 3.2;
by its kernels on a GPU where they are installed, else in plain torch). Tokens whose label is ignored are left out
before the first multiplication.
"""

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.data.batches import Batch
from engine.data.examples import IGNORED
from engine.data.moving import KnownMask, to_device
from engine.planner.output_layer import CHUNKED_FAMILIES, chunk_tokens
from engine.sparse.trial import Trial


@dataclass(frozen=True)
class OutputLayer:
    """How the last hidden states become logits: cap * tanh(scale * (x @ weight.T + bias) / cap).

    `cap` is None where there is none; `divisor` and `factor` make the scale, as some families divide and some multiply.
    """

    weight: Tensor  # (vocabulary, hidden)
    bias: Tensor | None  # (vocabulary,)
    cap: float | None
    divisor: float
    factor: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of `hidden`, (tokens, hidden), in its dtype: (tokens, vocabulary)."""
        logits = functional.linear(hidden, self.weight, self.bias)
        if self.divisor != 1 or self.factor != 1:
            logits = logits.div_(self.divisor).mul_(self.factor)
        if self.cap is not None:
            logits = logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of `logits` by what the matrix product gave; a number where it is the same for all."""
        scale = self.factor / self.divisor
        return scale if self.cap is None else (1 - (logits / self.cap).square()).mul_(scale)


def output_layer(model: Any) -> OutputLayer | None:
    """Return the output layer of a causal model of transformers, or None where it is not known to be a plain one.

    It is where the family was compared (`CHUNKED_FAMILIES`), the layer is dense, and nobody replaced its forward.
    """
    config: Any = getattr(model, "config", None)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if getattr(config, "model_type", None) not in CHUNKED_FAMILIES or type(head) is not nn.Linear:
        return None
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return None
    return OutputLayer(
        head.weight,
        head.bias,
        cap=getattr(config, "final_logit_softcapping", None),
        divisor=getattr(config, "logits_scaling", None) or 1.0,
        factor=getattr(config, "logit_scale", None) or 1.0,
    )


class ChunkedCrossEntropy(torch.autograd.Function):
    """loss = sum of -log softmax(logits(hidden))[label], with the gradients made in the forward.

    Forward:   for each chunk: p = softmax(logits), g = p - onehot(label), dL/dhidden = g @ W, dL/dW += g.T @ hidden
    Backward:  both times the gradient of the loss.

    A softmax in fp32 over logits in the dtype of the model, as the plain loss has it; the gradient of W is summed in
    fp32 over the chunks. The loss is a sum, not a mean, so that gradients in float16 keep their small numbers.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, layer: OutputLayer
    ) -> Tensor:
        """Return the summed loss; keep the gradients.

        Args:
            ctx: of autograd.
            hidden: (tokens, hidden).
            weight: that of `layer`, for its gradient.
            bias: that of `layer`, for its gradient.
            labels: (tokens,) int64, none ignored.
            layer: makes the logits.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needed = ctx.needs_input_grad[:3]
        grads = [
            torch.empty_like(hidden) if needed[0] else None,
            torch.zeros_like(weight, dtype=wide) if needed[1] else None,
            torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None,
        ]
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        size = chunk_tokens(weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            loss += _add_chunk(layer, hidden[rows], labels[rows], grads, rows)
        ctx.kept = grads
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return what the forward kept, times the gradient of the loss, in fp32: that gradient may be a loss scale."""
        kept, ctx.kept = ctx.kept, None
        assert kept is not None, "what the forward kept is scaled in place: one backward a forward"
        wide, scale = grads[0].dtype, grads[0]
        scaled = (grad if grad is None else grad.to(wide).mul_(scale).to(ctx.dtype) for grad in kept)
        return (*scaled, None, None)


def _add_chunk(layer: OutputLayer, hidden: Tensor, labels: Tensor, grads: list[Tensor | None], rows: slice) -> Tensor:
    """Return the loss of one chunk and put its gradients into `grads`: of the hidden states, the weight, the bias."""
    of_hidden, of_weight, of_bias = grads
    logits = layer.logits(hidden)  # (chunk, vocabulary)
    slope = layer.slope(logits)
    shares = logits.to(torch.promote_types(logits.dtype, torch.float32))
    del logits
    chosen = shares.gather(1, labels[:, None])
    top = shares.amax(1, keepdim=True)
    shares.sub_(top).exp_()  # in place: the softmax of a chunk is the largest tensor here
    total = shares.sum(1, keepdim=True)
    loss = (total.log() + top - chosen).sum()
    if all(grad is None for grad in grads):
        return loss
    shares.div_(total).scatter_add_(1, labels[:, None], torch.full_like(total, -1.0))
    grad = shares.to(hidden.dtype).mul_(slope)
    del shares
    if of_hidden is not None:
        torch.mm(grad, layer.weight, out=of_hidden[rows])
    if of_weight is not None:
        of_weight.add_(grad.T @ hidden)
    if of_bias is not None:
        of_bias.add_(grad.sum(0))
    return loss


def chunked_causal_loss(
    model: nn.Module, layer: OutputLayer, batch: Batch, labelled_tokens: int, device: torch.device
) -> Tensor:
    """Return the same as `engine.evaluate.causal_loss`, to the rounding of sums, without the logits of all tokens.

    Args:
        model: of which `layer` is the output layer.
        layer: from `output_layer(model)`.
        batch: labels unshifted, -100 where nothing is predicted.
        labelled_tokens: the divisor, at least 1.
        device: where the model is.
    """
    labels = batch.labels[:, 1:].flatten()
    places = (labels != IGNORED).nonzero().flatten()  # in main memory: on a GPU this would wait for it
    # A token predicts the next one: of each row the last has none.
    length = batch.labels.shape[1]
    tokens = places + places // (length - 1)
    input_ids, mask = to_device(batch.input_ids, device), KnownMask.of(batch.attention_mask, device)
    body: Any = getattr(model, str(model.base_model_prefix))
    # No name for the states of all tokens: once those that predict are taken, nobody needs them.
    states = partial(body, input_ids=input_ids, attention_mask=mask, use_cache=False)
    chosen = states().last_hidden_state.flatten(0, 1).index_select(0, to_device(tokens, device))
    return summed_loss(layer, chosen, to_device(labels[places], device)) / labelled_tokens


def summed_loss(layer: OutputLayer, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of `labels`, without the logits of all tokens.

    On a GPU by Liger-Kernel's kernels, which make it in fewer passes, where they are installed and agree. Their forward
    and their backward each wait for a number from the device, and a chunk is as large as they see fit: its logits take
    up to twice the memory of `hidden`.

    Args:
        layer: makes the logits.
        hidden: (tokens, hidden).
        labels: (tokens,) int64, none ignored.
    """
    if hidden.is_cuda and layer.cap is None and layer.divisor == layer.factor == 1:
        found = LIGER.run(lambda: liger_loss(layer, hidden, labels), hidden.device, hidden.dtype)
        if found is not None:
            return found
    return plain_loss(layer, hidden, labels)


def plain_loss(layer: OutputLayer, hidden: Tensor, labels: Tensor) -> Tensor:
    """See `summed_loss`."""
    loss: Tensor = ChunkedCrossEntropy.apply(hidden, layer.weight, layer.bias, labels, layer)  # type: ignore[no-untyped-call]
    return loss


def liger_loss(layer: OutputLayer, hidden: Tensor, labels: Tensor) -> Tensor:
    """See `summed_loss`; of a layer without scale and soft cap (Liger-Kernel, arXiv:2410.10989)."""
    options = (IGNORED, 0.0, 0.0, "sum", None, False, torch.float32)
    module = import_module("liger_kernel.ops.fused_linear_cross_entropy")
    found = module.LigerFusedLinearCrossEntropyFunction.apply(hidden, layer.weight, labels, layer.bias, None, *options)
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    return loss


def losses_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether Liger-Kernel's loss and gradients are those of the plain form, to the rounding of `dtype`."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator).div_(4).to(device, dtype) for rows in (40, 200))
    labels = torch.randint(0, 200, (40,), generator=generator).to(device)
    found = []
    for form in (liger_loss, plain_loss):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.enable_grad():
            loss = form(OutputLayer(leaves[1], None, None, 1.0, 1.0), leaves[0], labels)
            found.append((loss, *torch.autograd.grad(2 * loss, leaves)))
    room = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    return all(torch.allclose(one, other, rtol=room, atol=room) for one, other in zip(*found, strict=True))


LIGER = Trial("The loss in chunks is computed", losses_agree, library="liger_kernel")
