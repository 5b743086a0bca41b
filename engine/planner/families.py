"""From a config.json to the numbers and the tensors of a model, for the families whose layout is known.

`EXACT_FAMILIES` were compared with a trace of the real model class; of the others the planner knows less and says so.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.planner.config_defaults import DEFAULTS

Shape = tuple[int, ...]

# Within 1 percent of the trace in every setting of `python -m benchmarks.planner_formulas`; granite and smollm3, which
# are Llamas with other factors, in the settings of the tests.
EXACT_FAMILIES = frozenset(
    (
        *("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma3_text"),
        *("phi", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"),
    )
)
# Families whose parameters follow from the config alone.
KNOWN_LAYOUTS = EXACT_FAMILIES | {"gemma", "gemma2", "phi3"}
_BIASED_QKV = frozenset(("qwen2",))
_NORMED_HEADS = frozenset(("qwen3", "qwen3_moe", "gemma3_text"))
_FOUR_NORMS = frozenset(("gemma2", "gemma3_text"))
_FUSED = frozenset(("phi3",))
# Where config.json does not say whether the output layer is the embedding.
_TIED_BY_DEFAULT = frozenset(("gemma", "gemma2", "gemma3_text", "gpt2", "smollm3"))
# Whose class in transformers 5.23 computes its attention by plain products alone.
WITHOUT_FUSED_ATTENTION = frozenset(
    (
        *("big_bird", "bloom", "canine", "codegen", "convbert", "cpmant", "deberta", "deberta-v2", "deepseek_v4"),
        *("falcon_mamba", "flaubert", "flint", "fnet", "funnel", "gemma2", "git", "got_ocr2", "gpt_neo"),
        *("gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "hy_v4", "ibert", "inkling2_text"),
        *("layoutlmv2", "layoutlmv3", "lilt", "longformer", "luke", "mamba", "mamba2", "markuplm", "megatron-bert"),
        *("mimo_v2_flash", "mpnet", "mpt", "mra", "nystromformer", "openai-gpt", "perceiver", "reformer", "rembert"),
        *("roformer", "rwkv", "squeezebert", "tapas", "vaultgemma", "xglm", "xlm", "xlnet", "xlstm", "yoso"),
    )
)
# The language model inside one that also sees: its place in the files and in the class.
LANGUAGE_MODEL = r"^(language_model\.model|model\.language_model)\."
_USUAL_HEAD_DIM = 64  # where a config names no heads, as of models without attention
_BUFFERS = ("rotary_emb.inv_freq", "position_ids", "attn.masked_bias")


class UnknownConfigError(ValueError):
    """config.json lacks a number that the plan needs; the message is its name."""


@dataclass(frozen=True)
class Numbers:
    """The sizes that decide memory. `experts_per_token` is 0 where the MLP is dense; `ffn` is that of one expert."""

    family: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool | None
    sliding_window: int | None
    experts_per_token: int
    positions: int | None = None


def read_numbers(config: dict[str, Any]) -> Numbers:
    """Return the numbers of a config.json; those of the language model where it nests them.

    Raises:
        UnknownConfigError: a number is missing or no whole number.
    """
    outer, config = config, language_config(config)
    family = str(config.get("model_type") or outer.get("model_type") or "unknown")
    hidden = _whole(config, "hidden_size", "n_embd", "n_embed", "d_model", "dim", "emb_dim")
    heads = _heads(config, family, hidden)
    architectures = config.get("architectures") or outer.get("architectures") or [family]
    tied = config.get("tie_word_embeddings", outer.get("tie_word_embeddings"))
    return Numbers(
        family=family,
        architecture=str(architectures[0]),
        hidden=hidden,
        layers=_layers(config),
        heads=heads,
        kv_heads=_whole(config, "num_key_value_heads", "num_kv_heads", default=heads),
        head_dim=_whole(config, "head_dim", default=hidden // heads),
        ffn=_whole(
            config, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "hidden_dim", default=4 * hidden
        ),
        vocabulary=_whole(config, "vocab_size"),
        tied=bool(tied) if tied is not None else None,
        sliding_window=_window(config),
        experts_per_token=_whole(config, "num_experts_per_tok", "num_experts_per_token", default=0),
        positions=_whole(config, "max_position_embeddings", "n_positions", default=0) or None,
    )


def _heads(config: dict[str, Any], family: str, hidden: int) -> int:
    names = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    known = family in KNOWN_LAYOUTS
    heads = _whole(config, *names, default=None if known else -(-hidden // _USUAL_HEAD_DIM))
    if known and hidden % heads and "head_dim" not in config:
        raise UnknownConfigError("head_dim")
    return heads


def _layers(config: dict[str, Any]) -> int:
    kinds = config.get("layers_block_type") or config.get("layer_types") or ()  # a name for each layer
    return _whole(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers", default=len(kinds) or None)


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    config = config.get("text_config") or config
    return {**DEFAULTS.get(str(config.get("model_type")), {}), **config}


def parameters_of(tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return stored tensors without those that are no parameters."""

    def is_buffer(name: str, shape: Shape) -> bool:  # old GPT-2 files hold the causal mask as attn.bias
        return name.endswith(_BUFFERS) or (name.endswith("attn.bias") and len(shape) == 4)

    return {name: shape for name, shape in tensors.items() if not is_buffer(name, shape)}


def language_tensors(tensors: Mapping[str, Shape], config: dict[str, Any]) -> Mapping[str, Shape]:
    """Return the tensors of the language model alone, which is what is loaded, under the names it has by itself."""
    if not config.get("vision_config") or language_config(config).get("model_type") not in KNOWN_LAYOUTS:
        return tensors
    renamed = {
        re.sub(LANGUAGE_MODEL, "model.", name).removeprefix("language_model."): shape for name, shape in tensors.items()
    }
    own = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
    return {name: shape for name, shape in renamed.items() if name.startswith(own)}


def _whole(config: dict[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise UnknownConfigError(names[0])
            return value
    if default is None:
        raise UnknownConfigError(names[0])
    return default


def _window(config: dict[str, Any]) -> int | None:
    if config.get("use_sliding_window") is False:
        return None
    window = config.get("sliding_window")
    return window if isinstance(window, int) else None


def is_tied(numbers: Numbers) -> bool:
    """Return whether the output layer is the embedding, as the config or the family's default says."""
    return numbers.tied if numbers.tied is not None else numbers.family in _TIED_BY_DEFAULT


def tensors_of(numbers: Numbers, config: dict[str, Any]) -> dict[str, Shape]:
    """Return the parameters, name to shape, that a model with this config has; tied weights once.

    Families that are not known are taken for the Llama layout with as many experts as the config names.
    """
    config = language_config(config)
    if numbers.family in _OWN_NAMES:
        return dict(_OWN_NAMES[numbers.family](numbers, config))
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (numbers.vocabulary, numbers.hidden)}
    for layer in range(numbers.layers):
        for name, shape in _llama_block(numbers, config):
            tensors[f"model.layers.{layer}.{name}"] = shape
    tensors["model.norm.weight"] = (numbers.hidden,)
    if not is_tied(numbers):
        tensors["lm_head.weight"] = (numbers.vocabulary, numbers.hidden)
    return tensors


def as_loaded(numbers: Numbers, config: dict[str, Any], tensors: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Return stored tensors as the model's class has them: files may use other names, or hold experts one by one."""
    if numbers.family not in KNOWN_LAYOUTS:
        return tensors
    own = tensors_of(numbers, config)
    return own if entries_of(own) == entries_of(tensors) else tensors


def entries_of(tensors: Mapping[str, Shape]) -> int:
    """Return the entries of all tensors."""
    return sum(map(math.prod, tensors.values()))


def _llama_block(numbers: Numbers, config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, family = numbers.hidden, numbers.family
    q, kv = numbers.heads * numbers.head_dim, numbers.kv_heads * numbers.head_dim
    bias = bool(config.get("attention_bias"))
    linears = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    if family in _FUSED:
        linears = {"qkv_proj": (q + 2 * kv, hidden), "o_proj": (hidden, q)}
    for name, shape in linears.items():
        yield f"self_attn.{name}.weight", shape
        if bias or (family in _BIASED_QKV and name != "o_proj"):
            yield f"self_attn.{name}.bias", shape[:1]
    if family in _NORMED_HEADS:
        yield "self_attn.q_norm.weight", (numbers.head_dim,)
        yield "self_attn.k_norm.weight", (numbers.head_dim,)
    yield from _mlp(numbers, config)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if family in _FOUR_NORMS:
        yield "pre_feedforward_layernorm.weight", (hidden,)
        yield "post_feedforward_layernorm.weight", (hidden,)


def _mlp(numbers: Numbers, config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = numbers.hidden, numbers.ffn
    experts = _whole(config, "num_local_experts", "num_experts", "n_routed_experts", default=0)
    if experts:
        yield "mlp.gate.weight", (experts, hidden)
        yield "mlp.experts.gate_up_proj", (experts, 2 * ffn, hidden)
        yield "mlp.experts.down_proj", (experts, hidden, ffn)
        return
    linears = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    if numbers.family in _FUSED:
        linears = {"gate_up_proj": (2 * ffn, hidden), "down_proj": (hidden, ffn)}
    for name, shape in linears.items():
        yield f"mlp.{name}.weight", shape
        if config.get("mlp_bias"):
            yield f"mlp.{name}.bias", shape[:1]


def _gpt2(numbers: Numbers, config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = numbers.hidden, numbers.ffn
    yield "transformer.wte.weight", (numbers.vocabulary, hidden)
    yield "transformer.wpe.weight", (_whole(config, "n_positions", "max_position_embeddings", default=1024), hidden)
    parts: dict[str, Shape] = {
        "ln_1": (hidden,),
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "ln_2": (hidden,),
        "mlp.c_fc": (hidden, ffn),
        "mlp.c_proj": (ffn, hidden),
    }
    for layer in range(numbers.layers):
        for name, shape in parts.items():
            yield f"transformer.h.{layer}.{name}.weight", shape
            yield f"transformer.h.{layer}.{name}.bias", shape[-1:]
    yield "transformer.ln_f.weight", (hidden,)
    yield "transformer.ln_f.bias", (hidden,)
    if not is_tied(numbers):
        yield "lm_head.weight", (numbers.vocabulary, hidden)


def _weighted(name: str, shape: Shape, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    """Return a weight, (out, in) or (width,), and the bias beside it."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _gpt_neox(numbers: Numbers, config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = numbers.hidden, numbers.ffn
    bias = bool(config.get("attention_bias", True))
    yield "gpt_neox.embed_in.weight", (numbers.vocabulary, hidden)
    for layer in range(numbers.layers):
        block = f"gpt_neox.layers.{layer}"
        yield from _weighted(f"{block}.input_layernorm", (hidden,))
        yield from _weighted(f"{block}.post_attention_layernorm", (hidden,))
        yield from _weighted(f"{block}.attention.query_key_value", (3 * hidden, hidden), bias)
        yield from _weighted(f"{block}.attention.dense", (hidden, hidden), bias)
        yield from _weighted(f"{block}.mlp.dense_h_to_4h", (ffn, hidden))
        yield from _weighted(f"{block}.mlp.dense_4h_to_h", (hidden, ffn))
    yield from _weighted("gpt_neox.final_layer_norm", (hidden,))
    if not is_tied(numbers):
        yield "lm_head.weight", (numbers.vocabulary, hidden)


def _phi(numbers: Numbers, config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = numbers.hidden, numbers.ffn
    q, kv = numbers.heads * numbers.head_dim, numbers.kv_heads * numbers.head_dim
    yield "model.embed_tokens.weight", (numbers.vocabulary, hidden)
    for layer in range(numbers.layers):
        block = f"model.layers.{layer}"
        for name, outputs in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            yield from _weighted(f"{block}.self_attn.{name}", (outputs, hidden))
        yield from _weighted(f"{block}.self_attn.dense", (hidden, q))
        if config.get("qk_layernorm"):
            yield from _weighted(f"{block}.self_attn.q_layernorm", (hidden // numbers.heads,))
            yield from _weighted(f"{block}.self_attn.k_layernorm", (hidden // numbers.heads,))
        yield from _weighted(f"{block}.mlp.fc1", (ffn, hidden))
        yield from _weighted(f"{block}.mlp.fc2", (hidden, ffn))
        yield from _weighted(f"{block}.input_layernorm", (hidden,))
    yield from _weighted("model.final_layernorm", (hidden,))
    if not is_tied(numbers):
        yield "lm_head.weight", (numbers.vocabulary, hidden)
    yield "lm_head.bias", (numbers.vocabulary,)  # also beside a tied weight


_OWN_NAMES = {"gpt2": _gpt2, "gpt_neox": _gpt_neox, "phi": _phi}
