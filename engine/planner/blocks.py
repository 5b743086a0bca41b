"""The operations of one block, written on a tape from the layout of its family; and those after the last block."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from engine.planner.activations import FP32_BYTES, Kernel, Setting
from engine.planner.operations import INT64_BYTES, LinearWeight, Operations
from engine.planner.recompute import Kept
from engine.planner.shape import ModelShape
from engine.planner.tape import Backward, Held, Value

Weights = tuple[tuple[str, LinearWeight], ...]  # of one block: name inside it, without `.weight`
_PLAIN = LinearWeight(0)


@dataclass(frozen=True)
class Segment:
    """A stretch of the model between two states of the residual stream; bytes.

    `saved`: what it keeps between forward and backward; with checkpointing, when it is computed anew. `forward_peak`:
    the most that it holds meanwhile, as far as that is known to be more. `backward`: what its backward adds to what it
    keeps and to the gradient of its result.
    """

    saved: int
    forward_peak: int
    backward: Backward


@lru_cache(maxsize=256)
def block_segment(
    shape: ModelShape, setting: Setting, kernel: Kernel, weights: Weights, kept: Kept, entered: bool, buffer: int
) -> Segment:
    """Return what one block keeps and takes.

    Args:
        shape: of the model.
        setting: of the micro-batch.
        kernel: of this block's attention.
        weights: of this block.
        kept: what of it is kept for the backward.
        entered: whether the gradient goes on into its input.
        buffer: bytes of the buffer for dense gradients when its backward begins.
    """
    return _Block(shape, setting, kernel, weights, kept).segment(entered, buffer)


@lru_cache(maxsize=64)
def head_segment(shape: ModelShape, setting: Setting, weights: Weights, entered: bool, with_logits: bool) -> Segment:
    """Return what the last norm and, unless the loss is made in chunks, the output layer keep and take."""
    block = _Block(shape, setting, "eager", weights, Kept())
    x = block.input(shape.hidden, wanted=entered, outside=False)
    y = block.norm(x, "final")
    if with_logits:
        y = block.linear(y, shape.hidden, shape.vocabulary, block.weight("head"))
    return Segment(block.tape.saved_bytes, block.tape.forward_peak, block.tape.backward(y))


class _Block(Operations):
    """Writes one block."""

    def __init__(self, shape: ModelShape, setting: Setting, kernel: Kernel, weights: Weights, kept: Kept) -> None:
        self._weights: Mapping[str, LinearWeight] = dict(weights)
        super().__init__(setting, {name: each.trained for name, each in weights if each.trained is not None}, kept)
        self.shape, self.kernel, self.layout = shape, kernel, shape.layout
        self.names = shape.layout.names

    def weight(self, name: str) -> LinearWeight:
        return self._weights.get(name, _PLAIN)

    def segment(self, entered: bool, buffer: int) -> Segment:
        x = self.input(self.shape.hidden, wanted=entered, outside=not self.kept.inside)
        write = {"serial": self._serial, "normed": self._normed}.get(self.layout.branches, self._parallel)
        y = write(x)
        return Segment(self.tape.saved_bytes, self.tape.forward_peak, self.tape.backward(y, buffer))

    def norm(self, x: Value, name: str) -> Value:
        if self.layout.norm == "layer":
            return self.layer_norm(x, name)
        return self.rms_norm(x, self.shape.hidden, name, scaled_in_fp32=self.layout.norm == "gemma")

    def _serial(self, x: Value) -> Value:
        """x + attention(norm(x)), then the same with the MLP; Gemma's also norm what is added."""
        names, four = self.names, self.layout.four_norms
        attended = self._attention(self.norm(x, names.first_norm))
        if four:
            attended = self.norm(attended, "post_attention_layernorm")
        x = self.add(x, attended)
        made = self._mlp(self.norm(x, "pre_feedforward_layernorm" if four else names.second_norm))
        if four:
            made = self.norm(made, "post_feedforward_layernorm")
        return self.add(x, made)

    def _normed(self, x: Value) -> Value:
        """norm(attention(x) + x), then the same with the MLP.

        When it is computed, up to its last norm, its result lies beside what is saved and what went into it, the MLP,
        the sum and, but for DistilBERT, the last layer.
        """
        shape, layout, names = self.shape, self.layout, self.names
        entering = x
        x = self.norm(self.add(self._attention(x), x), names.first_norm)
        wide = self.activation(self.linear(x, shape.hidden, shape.ffn, self.weight(names.up)), layout.activation)
        made = self.dropout(self.linear(wide, shape.ffn, shape.hidden, self.weight(names.down)), layout.dropout)
        y = self.norm(self.add(made, x), names.second_norm)
        self.tape.reach(y.num_bytes, entering, x, made, *(() if layout.label_head == "distilbert" else (wide,)))
        return y

    def _parallel(self, x: Value) -> Value:
        """x + attention(norm(x)) + MLP(norm(x)), with one norm or two."""
        normed = self.norm(x, self.names.first_norm)
        attended = self._attention(normed)
        second = normed if self.layout.branches == "shared" else self.norm(x, self.names.second_norm)
        return self.add(self._mlp(second), attended, x)

    def _attention(self, x: Value) -> Value:
        shape, layout, names = self.shape, self.layout, self.names
        q, k, v = self._queries_keys_values(x)
        if layout.head_norms:
            wide = layout.norm == "gemma"
            q = self.rms_norm(q, shape.head_dim, "self_attn.q_norm", groups=shape.heads, scaled_in_fp32=wide)
            k = self.rms_norm(k, shape.head_dim, "self_attn.k_norm", groups=shape.kv_heads, scaled_in_fp32=wide)
        if layout.rotary:
            q, k = self.rotary(q, layout.rotary), self.rotary(k, layout.rotary)
        y = self.attention(
            q,
            k,
            v,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            self.kernel,
            dropout=layout.attention_dropout,
            narrow=float(layout.narrow_softmax),
            by_head=float(0 < layout.rotary < 1),
        )
        y = self.linear(y, shape.heads * shape.head_dim, shape.hidden, self.weight(names.o))
        return self.dropout(y, layout.attended_dropout)

    def _queries_keys_values(self, x: Value) -> tuple[Value, Value, Value]:
        shape, names, hidden = self.shape, self.names, self.shape.hidden
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if self.layout.qkv == "separate":
            return (
                self.linear(x, hidden, q, self.weight(names.q)),
                self.linear(x, hidden, kv, self.weight(names.k)),
                self.linear(x, hidden, kv, self.weight(names.v)),
            )
        each = self.e * self.tokens
        fused = self.linear(x, hidden, q + 2 * kv, self.weight(names.q))
        parts = self.tape.split(fused, (each * q, each * kv, each * kv))
        return parts[0], parts[1], parts[2]

    def _mlp(self, x: Value) -> Value:
        shape, layout, names = self.shape, self.layout, self.names
        if layout.experts:
            return self._experts(x)
        hidden, ffn = shape.hidden, shape.ffn
        if self.kept.lean:
            firsts = (names.gate, names.up) if layout.gated and not layout.fused_gate else (names.up,)
            parts = [
                self.linear(x, hidden, ffn * (2 if layout.fused_gate else 1), self.weight(name)) for name in firsts
            ]
            shared = layout.branches == "shared" or any(self.weight(name).trained for name in firsts)
            y = self.made_product(x, parts, layout.activation, gated=layout.gated, shared=shared)
        elif layout.fused_gate:
            both = self.linear(x, hidden, 2 * ffn, self.weight(names.up))
            gate, up = self.tape.split(both, (both.num_bytes // 2,) * 2)
            y = self.product(up, self.activation(gate, layout.activation))
        elif layout.gated:
            gate = self.activation(self.linear(x, hidden, ffn, self.weight(names.gate)), layout.activation)
            self.tape.keep(*((gate.held,) if gate.wanted else ()))  # while up is computed; then for the product
            y = self.product(gate, self.linear(x, hidden, ffn, self.weight(names.up)))
        else:
            y = self.activation(self.linear(x, hidden, ffn, self.weight(names.up)), layout.activation)
        return self.dropout(self.linear(y, ffn, hidden, self.weight(names.down)), layout.dropout)

    def _experts(self, x: Value) -> Value:
        """A mixture of experts by grouped products: S = T * experts a token copies of tokens, sorted by expert.

        Keeps the probabilities of all experts, 4 E T, the places of the copies, three times 8 S, gate and up of each
        copy in one, e 2f S, the activated gate, what down gave, e h S, and what trained weights read.
        """
        shape, tape, e = self.shape, self.tape, self.e
        copies = self.tokens * shape.experts_per_token
        wide = FP32_BYTES if self.layout.wide_routes else e
        route = self._route(x, wide)
        places = Held(INT64_BYTES * copies)
        chosen = tape.op(e * copies * shape.hidden, [x], [Held(INT64_BYTES * copies)])
        weights = tape.op(wide * copies, [route], [places])
        both = self._grouped(chosen, 2 * shape.ffn, "mlp.experts.gate_up_proj")
        gate, up = tape.split(both, (both.num_bytes // 2,) * 2)
        product = self.product(self.activation(gate, self.layout.activation), up)
        made = self._grouped(product, shape.hidden, "mlp.experts.down_proj")
        size = wide * copies * shape.hidden
        weighted = tape.op(size, [made, weights], [made, weights], scratch=size)
        ordered = tape.op(size, [weighted], [Held(INT64_BYTES * copies)])
        summed = tape.op(wide * self.tokens * shape.hidden, [ordered], passes=True)
        return self._cast(summed, e, wide)

    def _route(self, x: Value, wide: int) -> Value:
        """Softmax over all experts in fp32, the largest of them, divided by their sum."""
        shape, tape = self.shape, self.tape
        top = FP32_BYTES * self.tokens * shape.experts_per_token
        logits = self.linear(x, shape.hidden, self.layout.experts, self.weight("mlp.gate"))
        shares = self._cast(logits, FP32_BYTES, self.e)
        shares = tape.op(shares.num_bytes, [shares], keeps_result=True)
        best = tape.op(top, [shares], [Held(2 * top)])
        return self._cast(tape.op(top, [best], [Held(top), Held(FP32_BYTES * self.tokens)]), wide, FP32_BYTES)

    def _grouped(self, x: Value, outputs: int, name: str) -> Value:
        weight = self.weight(name).trained
        rows = self.tokens * self.shape.experts_per_token
        return self.tape.op(self.e * rows * outputs, [x], [x] if weight else (), weight=weight)
