"""Steps of each method against traces of an independent oracle: every case in the folder GOLDEN_DIR.

A case is a JSON of settings, losses and reselections with a safetensors of the entries at the end; tests/golden is the
default folder, and lends its model, batches and start entries to a folder that has none.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.sparse import spiel
from engine.sparse.attach import SparseTuning, attach
from engine.sparse.entries import ActiveEntries
from engine.sparse.optim import clip_gradient
from engine.sparse.optimizers import build_optimizer
from engine.sparse.selection import index_dtype
from engine.sparse.sm3 import grow_by_momenta
from engine.spec import RunSpec
from engine.spec_io import parse_spec
from engine.spec_rules import optimizer_of
from engine.train.checkpointing import checkpoint_blocks

OWN_DIR = Path(__file__).parent / "golden"
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or OWN_DIR)
DTYPES = {"float64": torch.float64, "fp64": torch.float64, "float32": torch.float32, "fp32": torch.float32}
NEAR_TIES = 0.005  # share of all entries that may be others
# As the traces call them, and as a spec does.
SPELLINGS = {"lr": "learning_rate", "accumulation": "gradient_accumulation"}
METHOD = ("method", "targets", "density", "num_trainable", "period", "estimation_steps", "initial_rate", "schedule")
NAMES = (*METHOD, "optimizer", "weight_decay", "learning_rate", "gradient_accumulation")
STATES = ("optimizer_states", "offload_states")  # of AdamW alone
# Ways to the gradient of the values, hooks where none is named, each also with entries and states kept otherwise and
# blocks that keep less. Tensors of this size have states in fp32 by any name, so that the numbers are the same.
BACK_ENDS: dict[str, dict[str, Any]] = {
    "hook": {},
    **{way: {"gradient_way": way} for way in ("dense", "compaction", "sampled")},
    "hook, compact, a block anew": {"optimizer_states": "compact", "recompute": "blocks", "recompute_blocks": 1},
    "auto, 8 bit, elementwise": {"gradient_way": "auto", "optimizer_states": "8bit", "recompute": "elementwise"},
    "dense, main memory, mlp": {"gradient_way": "dense", "offload_states": True, "recompute": "mlp"},
    "compaction, compact, mlp": {"gradient_way": "compaction", "optimizer_states": "compact", "recompute": "mlp"},
    "sampled, all anew": {"gradient_way": "sampled", "gradient_checkpointing": True, "offload_activations": True},
}


def _cases() -> list[str]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN_DIR.glob("*.json"))}
    return [name for name, body in found.items() if "settings" in body and "micro_loss" in body]


def _file(name: str) -> Path:
    return GOLDEN_DIR / name if (GOLDEN_DIR / name).is_file() else OWN_DIR / name


@pytest.fixture(scope="module")
def fixture() -> dict[str, Tensor]:
    return load_file(_file("fixture.safetensors"))


def _model(fixture: dict[str, Tensor], settings: dict[str, Any]) -> LlamaForCausalLM:
    config = LlamaConfig(**json.loads(_file("config.json").read_text()))
    model = LlamaForCausalLM(config).to(DTYPES[settings.get("dtype", "float32").removeprefix("torch.")])
    model.load_state_dict({name: tensor for name, tensor in fixture.items() if name != "batches"})
    return model


def _spec(settings: dict[str, Any]) -> RunSpec:
    named = {SPELLINGS.get(name, name): value for name, value in settings.items()}
    fields: dict[str, Any] = {name: named[name] for name in NAMES if name in named}
    if isinstance(fields.get("optimizer"), str):
        fields["optimizer"] = fields["optimizer"].lower().removesuffix("-ii")
    return parse_spec({"model": "golden", "gradient_accumulation": 1, **fields})


def _attach(model: LlamaForCausalLM, settings: dict[str, Any], back_end: dict[str, Any]) -> SparseTuning:
    """Attach the method; the SpIEL cases start from given entries instead of a density."""
    functions = "gradient_way" in back_end
    spec = _spec(settings)
    unknown = STATES if optimizer_of(spec) != "adamw" else ()
    spec = spec.model_copy(update={name: value for name, value in back_end.items() if name not in unknown})
    checkpoint_blocks(model, spec)
    if "init" not in settings:
        tuning = attach(model, spec, functions=functions)
        if spec.method in ("sift", "fisher"):
            first = settings.get("selection", "first step") == "first micro-step"
            tuning.begin_selection(1 if first else spec.gradient_accumulation)
        return tuning
    start = load_file(_file(settings["init"]))
    entries = []
    for name, parameter in model.named_parameters():
        if name in start:
            indices = start[name].sort().values.to(index_dtype(parameter.numel()))
            entries.append(ActiveEntries(name, parameter, len(indices), compact=spec.optimizer_states == "compact"))
            entries[-1].place(indices)
    return SparseTuning(model, entries, spec, functions=functions)


@dataclass
class Outcome:
    """What a run of a case gave: the entries, the loss of every micro-step, entries replaced by step."""

    entries: list[ActiveEntries]
    losses: list[float]
    replaced: dict[str, int]


def _train(model: LlamaForCausalLM, settings: dict[str, Any], batches: Tensor, back_end: dict[str, Any]) -> Outcome:
    tuning = _attach(model, settings, back_end)
    accumulation, steps = tuning.spec.gradient_accumulation, settings.get("steps", 20)
    betas = tuple(settings.get("betas", (0.9, 0.999)))
    optimizer = build_optimizer(tuning.entries, tuning.spec, betas=betas, eps=settings.get("eps"))
    tuning.begin_reselection(optimizer, steps)
    outcome = Outcome(tuning.entries, [], {})
    for step in range(1, steps + 1):
        if tuning.spiel:
            tuning.spiel.begin_step(step)
        for micro_step in range((step - 1) * accumulation, step * accumulation):
            ids = batches[micro_step % len(batches)]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            outcome.losses.append(float(loss.detach()))
            (loss / accumulation).backward()
            tuning.end_micro_step()
        _, clip = clip_gradient(tuning.values, settings.get("max_grad_norm"))
        optimizer.step()
        optimizer.zero_grad()
        tuning.write_back()
        if tuning.spiel and (done := tuning.spiel.end_step(step, clip)):
            outcome.replaced[str(step)] = done.replaced
    return outcome


def _among_inactive(scores: Tensor, active: Tensor, count: int) -> Tensor:
    free = torch.ones(len(scores), dtype=torch.bool)
    free[active] = False
    places = free.nonzero().flatten()
    return places[scores[places].topk(count).indices]


def _highest_position(scores: Tensor, active: Tensor, count: int) -> Tensor:
    masked = scores.index_fill(0, active, -1)
    return len(scores) - 1 - masked.flip(0).argsort(descending=True, stable=True)[:count]


def _lowest_position(scores: Tensor, active: Tensor, count: int) -> Tensor:
    return scores.index_fill(0, active, -1).argsort(descending=True, stable=True)[:count]


def _longer_list(scores: Tensor, active: Tensor, count: int) -> Tensor:
    return scores.index_fill(0, active, -1).topk(min(2 * count, len(scores))).indices[:count]


# An accumulator of a row and one of a column often hold the same number, so that products r_i c_j are equal to the last
# bit; which of them grows is left open, and a trace is reproduced where one plain way of breaking such ties gives it.
TIE_BREAKS = (None, _among_inactive, _highest_position, _lowest_position, _longer_list)


def _breaking_ties(choose: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """Return the growth of SpIEL-MA with ties broken as `choose` does; its scores must be those of the engine."""

    def grow(row_max: Tensor, column_max: Tensor, active: Tensor, count: int) -> Tensor:
        scores = torch.outer(row_max, column_max).flatten()
        ours = grow_by_momenta(row_max, column_max, active, count)
        chosen = choose(scores, active.long(), len(ours))
        assert torch.equal(scores[ours].sort().values, scores[chosen].sort().values), "not the largest products"
        return chosen

    return grow


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("case", _cases())
def test_reproduces_golden_trace(
    case: str, back_end: str, fixture: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.loads((GOLDEN_DIR / f"{case}.json").read_text())
    expected = load_file(GOLDEN_DIR / f"{case}.safetensors")
    found: list[AssertionError] = []
    for choose in TIE_BREAKS if body["settings"]["method"] == "spiel-ma" else (None,):
        if choose is not None:
            monkeypatch.setattr(spiel, "grow_by_momenta", _breaking_ties(choose))
        model = _model(fixture, body["settings"])
        outcome = _train(model, body["settings"], fixture["batches"], BACK_ENDS[back_end])
        try:
            _compare(outcome, body, expected)
            return
        except AssertionError as difference:
            found.append(difference)
    raise found[0]


def _compare(outcome: Outcome, body: dict[str, Any], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(torch.tensor(outcome.losses), torch.tensor(body["micro_loss"]), atol=1e-4, rtol=0)
    wanted = {step: count for step, count in (body.get("reselect") or {}).items() if count}
    ours = {step: count for step, count in outcome.replaced.items() if count}
    assert ours == pytest.approx(wanted, rel=NEAR_TIES, abs=2)
    others = 0
    for entry in outcome.entries:
        found, indices = entry.placed.long(), expected[f"{entry.name}.indices"].long()
        differing = torch.cat([found[~torch.isin(found, indices)], indices[~torch.isin(indices, found)]])
        others += len(differing) // 2
        if f"{entry.name}.final_weight" in expected:
            left, right = entry.weight.detach().flatten(), expected[f"{entry.name}.final_weight"].flatten()
        else:
            left = _scatter(entry.weight.numel(), found, entry.values.detach())
            right = _scatter(entry.weight.numel(), indices, expected[f"{entry.name}.values"])
        left, right = (side.double().index_fill(0, differing, 0) for side in (left, right))
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    total = sum(entry.num_active for entry in outcome.entries)
    assert others <= NEAR_TIES * total, f"{others} of {total} entries are others than in the trace"


def _scatter(numel: int, indices: Tensor, values: Tensor) -> Tensor:
    return torch.zeros(numel, dtype=torch.float64).index_copy_(0, indices, values.double())


def test_golden_folder_has_cases() -> None:
    assert _cases(), f"{GOLDEN_DIR} holds no case"
