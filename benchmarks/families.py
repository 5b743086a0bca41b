"""All families of transformers as tiny random models: `python -m benchmarks.families`.

Of each causal family, or with `--task classification` of each that takes a head for labels: does a backward give the
trained entries the numbers that the dense gradient has there, and does a trace hold what a real step holds? A family
is made by its own config class with every width brought down; one that cannot be built that small is counted and named.
The largest error of the gradients is over the largest entry of each. `--family NAME` for some, `--json` for all rows.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, suppress
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import logging

from engine.hardware import resolve_device
from engine.models import load_classifier, load_model
from engine.planner.ledger import add_up
from engine.planner.trace import count_real, trace
from engine.sparse.attach import attach
from engine.sparse.base_weight import base_weights
from engine.spec import RunSpec

Row = dict[str, Any]
CPU = torch.device("cpu")
LAYERS, VOCABULARY, LENGTH, ROWS = 4, 300, 24, 2  # of four layers one has full attention, in families that mix
LARGEST = 30_000_000  # parameters; what stays larger is not tried
GRADIENT_GOAL, TRACE_GOAL = 1e-4, 1e-3  # fp32: what is left is the order of the sums

# Sizes under the names that families give them; those that a config does not have are left out.
SIZES: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "hidden": (64, ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "attention_hidden_size", "lru_width")),
    "embedding": (32, ("embedding_size",)),
    "mlp": (128, ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size", "dim_feedforward")),
    "expert": (32, ("moe_intermediate_size", "shared_expert_intermediate_size")),
    "experts": (4, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    "experts a token": (2, ("num_experts_per_tok", "moe_k", "moe_topk")),
    "expert groups": (1, ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts")),
    "heads": (4, ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "num_key_value_heads")),
    "head": (16, ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")),
    "queries": (32, ("qk_head_dim", "q_lora_rank")),
    "rotary": (8, ("rotary_dim",)),
    "linear attention": (16, ("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim")),
    "its heads": (2, ("linear_num_key_heads", "linear_num_value_heads", "expand")),
    "its state": (8, ("state_size", "ssm_state_size", "mamba_d_state", "mamba_n_heads", "mamba_num_heads")),
    "its width": (128, ("mamba_d_ssm",)),
    "layers": (LAYERS, ("num_hidden_layers", "n_layer", "n_layers", "num_layers")),
    "vocabulary": (VOCABULARY, ("vocab_size",)),
    "positions": (128, ("max_position_embeddings", "n_positions")),
    "begin": (1, ("bos_token_id",)),
    "end": (2, ("eos_token_id",)),
}
LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")  # a word for each layer


def shrink(config: Any) -> None:
    """Bring the sizes of a config down, and its dropouts to zero; what follows from others refuses and stays."""
    for part in (config, getattr(config, "text_config", None)):
        sizes = {name: size for size, names in SIZES.values() for name in names}
        lists = {name: value[:LAYERS] for name in LISTS if isinstance(value := getattr(part, name, None), list)}
        wanted = {name: size for name, size in sizes.items() if type(getattr(part, name, None)) is int} | lists
        for name, value in wanted.items():
            with suppress(AttributeError, NotImplementedError):
                setattr(part, name, value)
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    config.pad_token_id = 0


def rows(task: str, families: list[str]) -> Iterator[Row]:
    """Yield what was found of each family."""
    causal = task == "causal"
    classes = MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    kinds = {kind.model_type: kind for kind in classes}
    for family in families or sorted(kinds):
        row: Row = {"name": family, "task": task}
        with tempfile.TemporaryDirectory() as folder:
            try:
                _make(kinds[family], causal, folder)
            except Exception as error:  # there is no end of what such a config does not suit
                yield row | {"left_out": _first_line(error)}
                continue
            try:
                yield row | _measure(folder, causal)
            except Exception as error:
                yield row | {"failed": _first_line(error)}


def _make(kind: Any, causal: bool, folder: str) -> None:
    config = kind()
    shrink(config)
    loader = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    with torch.device("meta"):
        entries = sum(parameter.numel() for parameter in loader.from_config(config).parameters())
    if entries > LARGEST:
        raise ValueError(f"{entries:,} parameters at the least")
    torch.manual_seed(0)
    model = loader.from_config(config)
    _loss(model, causal).backward()  # whether it can be trained at all
    model.save_pretrained(folder)


def _loss(model: Any, causal: bool) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    more = {"labels": ids, "use_cache": False} if causal else {"labels": torch.arange(ROWS)}
    loss: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).loss
    return loss


def _measure(folder: str, causal: bool) -> Row:
    spec = RunSpec(
        model=folder,
        density=0.05,
        sequence_length=LENGTH,
        micro_batch_size=ROWS,
        dtype="float32",
        task="causal" if causal else "classification",
    )
    model, _ = _load(spec)
    gradients = gradient_error(model, spec, causal)
    model, head = _load(spec)
    real = add_up(count_real(model, spec, head=head), 0, host_apart=False).peak.total
    traced = trace(spec, resolve_device("cpu"), rounding=0).peak.total
    return {
        "gradient_error": gradients,
        "trace_error": traced / real - 1,
        "attention": model.config._attn_implementation,
    }


def _load(spec: RunSpec) -> tuple[PreTrainedModel, tuple[str, ...]]:
    return (load_model(spec, CPU), ()) if spec.task == "causal" else load_classifier(spec, CPU, ("no", "yes"))


def gradient_error(model: Any, spec: RunSpec, causal: bool) -> float:
    """Return the largest distance of a trained entry's gradient from the dense one's, over the weight's largest."""
    loss = partial(_loss, model, causal)
    weights = base_weights(model)
    for weight in weights.values():
        weight.requires_grad_(True)
    loss().backward()
    dense = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
    model.zero_grad()
    tuning = attach(model, spec.model_copy(update={"method": "random"}))
    loss().backward()
    worst = 0.0
    for entry in tuning.entries:
        if entry.name not in dense:  # no part of this loss
            continue
        wanted = dense[entry.name].reshape(-1)[entry.placed.long()]
        found = torch.zeros_like(wanted) if entry.values.grad is None else entry.values.grad
        largest = float(dense[entry.name].abs().max())
        worst = max(worst, float((found - wanted).abs().max()) / largest if largest else float(found.abs().max()))
    return worst


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def main() -> None:
    """Print a line for each family, and how many are within the goals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=("causal", "classification"), default="causal")
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    found = []
    silent = StringIO()
    with redirect_stderr(silent):  # of progress bars and of what classes say about their configs
        for row in rows(options.task, options.family):
            found.append(row)
            if not options.json:
                print(_line(row), flush=True)
    if options.json:
        json.dump(found, sys.stdout)
        return
    tried = [row for row in found if "left_out" not in row]
    good = [row for row in tried if _within(row)]
    print(f"{len(good)} of {len(tried)} within the goals; {len(found) - len(tried)} cannot be built this small.")


def _within(row: Row) -> bool:
    return "failed" not in row and row["gradient_error"] <= GRADIENT_GOAL and abs(row["trace_error"]) <= TRACE_GOAL


def _line(row: Row) -> str:
    said = row.get("left_out") or row.get("failed")
    if said:
        return f"{row['name']:<26}{'left out' if 'left_out' in row else 'failed':<10}{said}"
    mark = "" if _within(row) else "   over the goal"
    figures = f"gradient {row['gradient_error']:.0e}, trace {row['trace_error']:+.3%}, {row['attention']}"
    return f"{row['name']:<26}{'':<10}{figures}{mark}"


if __name__ == "__main__":
    main()
