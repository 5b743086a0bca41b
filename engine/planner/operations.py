"""What the operations of a transformer block keep, make and take in a backward, written on a tape of sizes. Bytes.

Symbols: T tokens of a micro-batch (rows * length), s length, e bytes per element of the base. Each function notes what
transformers 5.23 computes, in its order, under PyTorch 2.13: the reciprocal root of a norm, the fp32 copies of 16-bit
inputs, the score matrices of eager attention are values of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.planner.activations import FP32_BYTES, Kernel, Setting, up_to
from engine.planner.formulas import dequantised_bytes
from engine.planner.recompute import Kept
from engine.planner.tape import Held, Tape, Value, Weight

INT64_BYTES = 8
_ALL = Kept()
_LANES = 32  # the memory-efficient kernel rounds the log-sum-exps of a row up to this (PyTorch, attention.cu)
Activation = Literal["silu", "gelu", "gelu_new"]


@dataclass(frozen=True, slots=True)
class _ActivationSizes:
    """Tensors beside input and result, of their size: what its graph keeps once it is made; what its backward takes."""

    graph: int
    scratch: int


# gelu_new is seven operations, of which half times x, tanh and 1 + tanh are kept.
_ACTIVATION_SIZES: Mapping[Activation, _ActivationSizes] = {
    "silu": _ActivationSizes(0, 0),
    "gelu": _ActivationSizes(0, 0),
    "gelu_new": _ActivationSizes(3, 5),
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA or IA3 adapter beside a linear layer. `first`, `second`: LoRA's matrices; IA3: `rank` is 0."""

    rank: int
    first: Weight
    second: Weight
    widened: bool = False
    scales_input: bool = False


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a linear layer: entries; whether it is stored in NF4; what of it is trained, or beside it.

    `adding`: bytes that adding the values to a dequantised weight takes. `biased`: whether the layer's bias is trained.
    """

    numel: int
    quantised: bool = False
    trained: Weight | None = None
    adapter: Adapter | None = None
    adding: int = 0
    biased: bool = False


class Operations:
    """Notes operations of one micro-batch on a tape."""

    def __init__(self, setting: Setting, trained: Mapping[str, Weight], kept: Kept = _ALL) -> None:
        """Begin a tape.

        Args:
            setting: of the micro-batch.
            trained: the weights that are trained, but for those of linear layers, by name.
            kept: what of the operations is kept for their backward.
        """
        self.tape, self.setting, self.trained, self.kept = Tape(), setting, trained, kept
        self.e, self.tokens = setting.element_bytes, setting.tokens

    def input(self, width: int, *, wanted: bool, outside: bool) -> Value:
        """Return the input of a block, (tokens, width)."""
        num_bytes = self.e * self.tokens * width
        return Value(num_bytes, Held(num_bytes, outside), wanted)

    def rms_norm(self, x: Value, width: int, name: str, *, groups: int = 1, scaled_in_fp32: bool = False) -> Value:
        """x / sqrt(mean(x^2)) * w over `groups` vectors of `width` a token, in fp32.

        Keeps the fp32 x and the reciprocal roots, 4 (width + 1) groups T; a trained w the normed x, in the base's type
        or, where it is scaled in fp32 (Gemma), in fp32.
        """
        tape, wide = self.tape, FP32_BYTES * self.tokens * width * groups
        if self.kept.lean and name not in self.trained:
            return self._frozen_norm(x, wide, Held(FP32_BYTES * self.tokens * groups))
        x32 = x if self.e == FP32_BYTES else tape.op(wide, [x])
        square = tape.op(wide, [x32], [x32], scratch=2 * wide)
        root = tape.op(FP32_BYTES * self.tokens * groups, [square], keeps_result=True)
        normed = tape.op(wide, [x32, root], [x32, root], scratch=wide)
        if not scaled_in_fp32:
            normed = self._cast(normed, self.e, FP32_BYTES)
        weight = self.trained.get(name)
        keeps = [normed] if weight else []
        scaled = tape.op(normed.num_bytes, [normed], keeps, scratch=normed.num_bytes if weight else 0, weight=weight)
        return self._cast(scaled, self.e, FP32_BYTES) if scaled_in_fp32 else scaled

    def _frozen_norm(self, x: Value, wide: int, root: Held) -> Value:
        """The norm of `engine.sparse.recompute`: keeps x and the roots, of which its result is made again.

        Its backward holds three fp32 tensors, one of which becomes the result; making again holds two for a moment.
        """
        y = self.tape.op(x.num_bytes, [x], [x, root], scratch=3 * wide - x.num_bytes)
        y.source, y.made, y.making = (x.held, root), y.num_bytes, 2 * wide - y.num_bytes
        return y

    def layer_norm(self, x: Value, name: str) -> Value:
        """The fused kernel: keeps x as it is, mean and reciprocal deviation in fp32, 8 T."""
        stats = Held(2 * FP32_BYTES * self.tokens)
        biased = f"{name}.bias" in self.trained
        y = self.tape.op(x.num_bytes, [x], [x, stats], weight=self.trained.get(name), biased=biased)
        if self.kept.lean and name not in self.trained:
            y.source, y.made = (x.held,), y.num_bytes
        return y

    def _cast(self, value: Value, to: int, of: int) -> Value:
        return value if to == of else self.tape.op(value.num_bytes * to // of, [value])

    def linear(self, x: Value, inputs: int, outputs: int, weight: LinearWeight) -> Value:
        """x @ w.T: a trained w keeps x; NF4 rebuilds w in the backward too; adapters see `_lora` and `_ia3`."""
        num_bytes = self.e * self.tokens * outputs
        rebuilt = dequantised_bytes(weight.numel, self.e) if weight.quantised else 0
        adapter = weight.adapter
        if adapter is not None and not adapter.rank and adapter.scales_input:
            x = self._ia3(x, inputs, adapter)
        if weight.trained is None:
            y = self.tape.op(num_bytes, [x], scratch=rebuilt, biased=weight.biased)
        elif weight.quantised:
            y = self.tape.op(num_bytes, [x], scratch=rebuilt + weight.adding, weight=weight.trained, reads=x)
        else:
            y = self.tape.op(num_bytes, [x], weight=weight.trained, reads=x)
        if adapter is None:
            return y
        if adapter.rank:
            return self._lora(x, y, outputs, adapter, weight.quantised)
        return y if adapter.scales_input else self._ia3(y, outputs, adapter)

    def _lora(self, x: Value, y: Value, outputs: int, adapter: Adapter, quantised: bool) -> Value:
        """y + B A x * scale in fp32 over any base: A keeps the fp32 x, 4 T in where that is a copy, B its 4 T r."""
        tape, wide = self.tape, FP32_BYTES * self.tokens * outputs
        x32 = x if self.e == FP32_BYTES else tape.op(x.num_bytes * FP32_BYTES // self.e, [x])
        if quantised:
            y = tape.op(y.num_bytes, [y], passes=True)  # PEFT clones it
        low = tape.op(FP32_BYTES * self.tokens * adapter.rank, [x32], [x32], weight=adapter.first)
        tape.reach(x.num_bytes + y.num_bytes + 2 * wide)  # the second product, before and after it is scaled
        change = tape.op(wide, [tape.op(wide, [low], [low], weight=adapter.second)])
        if quantised:
            change = self._cast(change, self.e, FP32_BYTES)
        if quantised or self.e == FP32_BYTES:
            return tape.op(y.num_bytes, [y, change], passes=True)
        # The gradient of y is cast on its way out of the sum.
        both = tape.op(wide, [tape.op(wide, [y]), change], passes=True)
        return self._cast(both, self.e, FP32_BYTES)

    def _ia3(self, value: Value, width: int, adapter: Adapter) -> Value:
        """value * factors: keeps the value, e T width, or 4 T width where PEFT multiplies in fp32."""
        to = FP32_BYTES if adapter.widened else self.e
        wide = self._cast(value, to, self.e)
        product = self.tape.op(wide.num_bytes, [wide], [wide], scratch=wide.num_bytes, weight=adapter.first)
        return self._cast(product, self.e, to)

    def rotary(self, x: Value, share: float = 1.0) -> Value:
        """Turn the first `share` of each head: keeps nothing but what all blocks share; temporaries in the backward."""
        if share == 1.0:
            return self.tape.op(x.num_bytes, [x], scratch=3 * x.num_bytes)
        return self.tape.op(x.num_bytes, [x], scratch=int((2 + 2 * share) * x.num_bytes))

    def dropout(self, x: Value, probability: float) -> Value:
        """Keeps which entries stay: on CUDA a byte of each, on the CPU a number of the tensor's type."""
        if not probability:
            return x
        return self.tape.op(x.num_bytes, [x], [Held(x.num_bytes if self.setting.on_cpu else x.num_bytes // self.e)])

    def activation(self, x: Value, kind: Activation) -> Value:
        """silu and gelu keep x. gelu_new, 0.5 x (1 + tanh(c (x + 0.04 x^3))), keeps x, both factors and the tanh."""
        tape, size = self.tape, x.num_bytes
        if kind != "gelu_new":
            return tape.op(size, [x], [x])
        half = tape.op(size, [x])
        cube = tape.op(size, [x], [x], scratch=2 * size)
        argument = tape.op(size, [tape.op(size, [x, tape.op(size, [cube])], passes=True)])
        bent = tape.op(size, [argument], keeps_result=True)
        factor = tape.op(size, [bent], passes=True)
        return tape.op(size, [half, factor], [half, factor])

    def made_product(self, h: Value, parts: Sequence[Value], kind: Activation, *, gated: bool, shared: bool) -> Value:
        """The function of `engine.sparse.recompute`: the activation of `parts`, which are products with h, or of two.

        Keeps the parts or, where these are not kept, what h is made of. In the backward all of it is made again for
        whoever reads the result; the graph of that stays for the gradients of the parts.

        Args:
            h: the input of the MLP.
            parts: gate and up, both in one, or the only one.
            kind: of the activation.
            gated: whether half of the parts is multiplied with the activation of the other.
            shared: whether others read h as well, so that it stays until the gradients of their weights are taken.
        """
        parts_bytes = sum(part.num_bytes for part in parts)
        size = parts_bytes // 2 if gated else parts_bytes
        both = Value(parts_bytes, parts[0].held, wanted=True, source=tuple(part.held for part in parts))
        if not self.kept.gates:
            staying = h.made if shared else 0
            both.source, both.made = h.kept, parts_bytes + staying
            both.making = h.made - staying
        acts = _ACTIVATION_SIZES[kind]
        joined = gated and len(parts) == 1  # both gradients, until they are put into one
        y = self.tape.op(size, parts, scratch=(acts.scratch + gated + joined) * size, reads=both)
        y.source, y.made = both.source, (1 + acts.graph + gated) * size + both.made
        return y

    def product(self, a: Value, b: Value) -> Value:
        """a * b, of one size: keeps both."""
        return self.tape.op(a.num_bytes, [a, b], [a, b])

    def add(self, *values: Value) -> Value:
        """Sum values of one size; keeps nothing."""
        total = values[0]
        for value in values[1:]:
            total = self.tape.op(value.num_bytes, [total, value], passes=True)
        return total

    def attention(
        self, q: Value, k: Value, v: Value, heads: int, kv_heads: int, head_dim: int, kernel: Kernel, **eager: float
    ) -> Value:
        """Attend with one kernel; returns (tokens, heads * head_dim). See the functions for each kernel.

        Args:
            q: (tokens, heads * head_dim).
            k: (tokens, kv_heads * head_dim).
            v: as k.
            heads: of q.
            kv_heads: of k and v.
            head_dim: of each.
            kernel: see `choose_kernel`.
            eager: `dropout`, a probability; `narrow`: 1 where the softmax stays in the base's type (GPT-2); `by_head`:
                1 where queries lie head by head.
        """
        plain = kernel in ("eager", "math")
        if 1 < kv_heads < heads and (plain or kernel == "masked"):
            k, v = (self.tape.op(q.num_bytes, [each]) for each in (k, v))  # repeated for each head; of one, a view
        elif plain and self.setting.rows > 1:
            # Rows and heads make one dimension for the product, which a view of transposed heads cannot be.
            q, k, v = (self.tape.op(q.num_bytes, [each]) for each in (q, k, v))
        if kernel == "eager":
            return self._eager(q, k, v, heads, dropout=eager.get("dropout", 0.0), narrow=bool(eager.get("narrow")))
        if kernel == "math":
            return self._math(q, k, v, heads, dropout=eager.get("dropout", 0.0))
        y = self._fused(q, k, v, heads, kv_heads, head_dim, kernel)
        # The flash kernels lay their result out as the queries are; the next layer wants it token by token.
        ordered = not eager.get("by_head") or (kernel != "flash" and not self.setting.on_cpu)
        return y if ordered else self.tape.op(y.num_bytes, [y])

    def _fused(self, q: Value, k: Value, v: Value, heads: int, kv_heads: int, head_dim: int, kernel: Kernel) -> Value:
        """Keeps q, k, v, the output and a log-sum-exp a row, 4 heads T; a mask for each block, e rows s^2."""
        rows, length = self.setting.rows, self.setting.length
        keeps: list[Value | Held] = [q, k, v]
        workspace = 0
        if kernel == "flash":
            keeps.append(Held(FP32_BYTES * heads * self.tokens))
            if not self.setting.on_cpu:
                workspace = flash_sums_bytes(rows, heads, length, head_dim)
                workspace += 2 * q.num_bytes if kv_heads < heads else 0
        else:
            lanes = length if self.setting.on_cpu else up_to(length, _LANES)
            keeps.append(Held(FP32_BYTES * heads * rows * lanes))
            if kernel == "masked":
                keeps.append(Held(self.e * rows * length * length))
        return self.tape.op(q.num_bytes, [q, k, v], keeps, keeps_result=True, scratch=workspace)

    def _eager(self, q: Value, k: Value, v: Value, heads: int, *, dropout: float, narrow: bool) -> Value:
        """softmax(q k.T * scale + mask) v, S = heads s T scores.

        Keeps q, k, v, the fp32 probabilities, 4 S, and in 16 bit their copy, e S.
        """
        tape, entries = self.tape, heads * self.setting.length * self.tokens
        scores = tape.op(self.e * entries, [q, k], [q, k])
        scores = tape.op(scores.num_bytes, [tape.op(scores.num_bytes, [scores])], passes=True)
        if not narrow:
            scores = self._cast(scores, FP32_BYTES, self.e)
        shares = tape.op(scores.num_bytes, [scores], keeps_result=True)
        if not narrow:
            shares = self._cast(shares, self.e, FP32_BYTES)
        shares = self.dropout(shares, dropout)
        return tape.op(q.num_bytes, [tape.op(q.num_bytes, [shares, v], [shares, v])])

    def _math(self, q: Value, k: Value, v: Value, heads: int, *, dropout: float) -> Value:
        """The plain products of `scaled_dot_product_attention`: queries and keys are scaled first.

        Keeps scaled q and k, v, and the probabilities in fp32, 4 S.
        """
        tape, scores = self.tape, FP32_BYTES * heads * self.setting.length * self.tokens
        q, k, v = (self._cast(each, FP32_BYTES, self.e) for each in (q, k, v))
        q, k = (tape.op(each.num_bytes, [each]) for each in (q, k))
        summed = tape.op(scores, [q, k], [q, k])
        shares = self.dropout(tape.op(scores, [summed], keeps_result=True), dropout)
        return self._cast(tape.op(q.num_bytes, [shares, v], [shares, v]), self.e, FP32_BYTES)


def flash_sums_bytes(rows: int, heads: int, length: int, head_dim: int) -> int:
    """Return the fp32 sums of flash attention's backward on CUDA: 128 queries at a time, head sizes up to 32."""
    return FP32_BYTES * rows * heads * up_to(length, 128) * (up_to(head_dim, 32) + 1)
