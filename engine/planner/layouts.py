"""How the blocks of a family are built: which norms, how queries, keys and values are made, what MLP. Torch-free.

A `Layout` is read from config.json; `blocks.py` writes a block's operations from it. Families that are not known are
taken for the Llama layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.targets import layer_number

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_POSITIONS = ("wpe.weight", "position_embeddings.weight", "token_type_embeddings.weight")
_LAST_NORMS = ("model.norm.weight", "ln_f.weight", "final_layer_norm.weight", "final_layernorm.weight")


@dataclass(frozen=True)
class Names:
    """What the parameters of a block are called, without `.weight`; empty where there is none."""

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    first_norm: str = "input_layernorm"
    second_norm: str = "post_attention_layernorm"


@dataclass(frozen=True)
class Layout:
    """How a block is built.

    `norm`: rms; gemma, which scales in fp32; layer, one fused kernel. `branches`: serial; parallel, the MLP beside the
    attention with a norm of its own; shared, with the same norm; normed, serial with each norm after its sum.
    `four_norms`: also after attention and MLP. `qkv`: three matrices; side by side in one, or in one head by head.
    `rotary`: share of each head that is turned. `narrow_softmax`: in the base's type. `dropout`: after the MLP;
    `attended_dropout`: after the attention's output layer. `fused_gate`: gate and up in one matrix. `wide_routes`: the
    router's weights stay in fp32. `transposed`: linear weights are (in, out), in modules that are no linear layers.
    `windows`: how far each layer sees, None: all the row. `embedding_norm`: before the blocks. `label_head`: what
    classifies the first token of an encoder (`label_head.py`), with `label_dropout`. `plain`: no option is set that the
    tapes do not know.
    """

    names: Names = Names()
    norm: Literal["rms", "gemma", "layer"] = "rms"
    branches: Literal["serial", "parallel", "shared", "normed"] = "serial"
    four_norms: bool = False
    qkv: Literal["separate", "side by side", "by head"] = "separate"
    head_norms: bool = False
    rotary: float = 1.0
    narrow_softmax: bool = False
    attention_dropout: float = 0.0
    dropout: float = 0.0
    attended_dropout: float = 0.0
    embedding_dropout: float = 0.0
    gated: bool = True
    fused_gate: bool = False
    activation: Literal["silu", "gelu", "gelu_new"] = "silu"
    experts: int = 0
    wide_routes: bool = False
    transposed: bool = False
    windows: tuple[int | None, ...] = ()
    embedding_norm: bool = False
    label_head: Literal["", "bert", "roberta", "distilbert"] = ""
    label_dropout: float = 0.0
    plain: bool = True

    def window(self, layer: int) -> int | None:
        """How far a layer sees."""
        return self.windows[layer] if layer < len(self.windows) else None


_GPT2 = Layout(
    Names("attn.c_attn", "", "", "attn.c_proj", "", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"),
    norm="layer",
    qkv="side by side",
    rotary=0.0,
    narrow_softmax=True,
    gated=False,
    transposed=True,
)
_NEOX = Layout(
    replace(
        Names(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
        q="attention.query_key_value",
        o="attention.dense",
    ),
    norm="layer",
    qkv="by head",
    gated=False,
)
_PHI = Layout(Names(o="self_attn.dense", up="mlp.fc1", down="mlp.fc2"), norm="layer", branches="shared", gated=False)
_PHI3 = Layout(Names(q="self_attn.qkv_proj", gate="", up="mlp.gate_up_proj"), qkv="side by side", fused_gate=True)
_GEMMA = Layout(norm="gemma")
_BERT = Layout(
    Names(
        *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        *("", "intermediate.dense", "output.dense", "attention.output.LayerNorm", "output.LayerNorm"),
    ),
    norm="layer",
    branches="normed",
    rotary=0.0,
    narrow_softmax=True,
    gated=False,
    embedding_norm=True,
    label_head="bert",
)
_DISTILBERT = replace(
    _BERT,
    names=Names(
        *("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        *("", "ffn.lin1", "ffn.lin2", "sa_layer_norm", "output_layer_norm"),
    ),
    label_head="distilbert",
)
_LAYOUTS: Mapping[str, Layout] = {
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "phi": _PHI,
    "phi3": _PHI3,
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, four_norms=True),
    "gemma3_text": replace(_GEMMA, four_norms=True, head_norms=True),
    "qwen3": Layout(head_norms=True),
    "qwen3_moe": Layout(head_norms=True),
    "mixtral": Layout(wide_routes=True),
    "bert": _BERT,
    "roberta": replace(_BERT, label_head="roberta"),
    "xlm-roberta": replace(_BERT, label_head="roberta"),
    "distilbert": _DISTILBERT,
}
_UNKNOWN = (
    *("qk_layernorm", "reorder_and_upcast_attn", "add_cross_attention", "router_jitter_noise", "mlp_only_layers"),
    *("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping", "output_router_logits"),
    *("is_decoder", "chunk_size_feed_forward"),
)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_new": "gelu_new"}
_DEFAULT_ACTIVATION = {"gpt2": "gelu_new", "phi": "gelu_new", "gpt_neox": "gelu"}
_USUAL_DROPOUT = 0.1  # of GPT-2 and the encoders, where config.json names none
_LABEL_DROPOUT = 0.2  # of DistilBERT
_ROTARY_SHARE = {"gpt_neox": 0.25, "phi": 0.5}


def read_layout(family: str, config: Mapping[str, Any], layers: int, head_norms: bool = False) -> Layout:
    """Return how the blocks of a model are built.

    Args:
        family: the config's model_type.
        config: that of the language model.
        layers: blocks.
        head_norms: whether its tensors name a norm of each head's queries, for families that are not known.
    """
    layout = _LAYOUTS.get(family, Layout(head_norms=head_norms))
    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    word = next((config[name] for name in names if config.get(name)), None)
    default = "gelu" if layout.label_head else _DEFAULT_ACTIVATION.get(family, "silu")
    kind: Any = _ACTIVATIONS.get(word, "gelu") if word else default
    usual = _USUAL_DROPOUT if family == "gpt2" or layout.label_head else 0.0
    dropout = _first(config, usual, "resid_pdrop", "hidden_dropout", "hidden_dropout_prob", "dropout")
    rope = config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    parallel = family == "gpt_neox" and config.get("use_parallel_residual", True)
    return replace(
        layout,
        branches="parallel" if parallel else layout.branches,
        rotary=0.0 if not layout.rotary else float(share or _ROTARY_SHARE.get(family, 1.0)),
        activation=kind,
        attention_dropout=_first(config, usual, "attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"),
        dropout=dropout,
        attended_dropout=0.0 if family == "distilbert" else dropout,
        embedding_dropout=_first(config, usual, "embd_pdrop", "hidden_dropout", "hidden_dropout_prob", "dropout"),
        experts=int(
            config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0
        ),
        windows=_windows(family, config, layers),
        label_dropout=_first(
            config,
            _LABEL_DROPOUT if family == "distilbert" else dropout,
            *("classifier_dropout", "seq_classif_dropout"),
        ),
        plain=not any(config.get(option) for option in _UNKNOWN) and config.get("decoder_sparse_step") in (None, 1),
    )


def _first(config: Mapping[str, Any], default: float, *names: str) -> float:
    return next((float(config[name]) for name in names if config.get(name) is not None), default)


def _windows(family: str, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Return how far each layer sees: by `layer_types`, by Gemma's pattern of six, or all alike."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return ()
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family in ("gemma2", "gemma3_text"):
        pattern = 2 if family == "gemma2" else int(config.get("sliding_window_pattern") or 6)
        return tuple(None if (layer + 1) % pattern == 0 else window for layer in range(layers))
    if family in ("qwen2", "qwen3"):
        first = int(config.get("max_window_layers") or 0)
        return tuple(window if layer >= first else None for layer in range(layers))
    return (window,) * layers


def is_embedding(name: str) -> bool:
    """Return whether a parameter is that of tokens or positions, which lie before the blocks."""
    return name.endswith((*EMBEDDINGS, *_POSITIONS))


def is_before_blocks(name: str) -> bool:
    """Return whether a parameter lies before the blocks: an embedding, or the norm over their sum (BERT)."""
    return is_embedding(name) or ".embeddings.LayerNorm." in name


def is_last_norm(name: str) -> bool:
    """Return whether a parameter is the scale of the norm after the last block."""
    return layer_number(name) is None and name.endswith(_LAST_NORMS)
