"""Twenty steps of each method against traces of an independent oracle: every case in the folder GOLDEN_DIR."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from engine.sparse.attach import SparseTuning, attach
from engine.sparse.entries import ActiveEntries
from engine.sparse.optimizers import build_optimizer
from engine.sparse.selection import index_dtype
from engine.spec import RunSpec, choices

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
BATCHES = 80


def _cases() -> list[str]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN_DIR.glob("*.json"))}
    return [
        name
        for name, body in found.items()
        if "case" in body
        and body["settings"]["method"] in choices("method")
        and body["settings"]["optimizer"] in choices("optimizer")
    ]


@pytest.fixture(scope="module")
def fixture() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN_DIR / "fixture.safetensors")


def _model(fixture: dict[str, torch.Tensor], settings: dict[str, Any]) -> LlamaForCausalLM:
    config = LlamaConfig(**json.loads((GOLDEN_DIR / "config.json").read_text()))
    model = LlamaForCausalLM(config).to(getattr(torch, settings["dtype"]))
    weights = {name: tensor for name, tensor in fixture.items() if name != "batches"}
    model.load_state_dict(weights)
    return model


def _spec(settings: dict[str, Any]) -> RunSpec:
    names = ("method", "density", "optimizer", "weight_decay", "period", "estimation_steps", "initial_rate", "schedule")
    fields = {name: settings[name] for name in names if name in settings}
    return RunSpec(
        model="golden",
        targets=tuple(settings["targets"]),
        learning_rate=settings["lr"],
        gradient_accumulation=settings["accumulation"],
        **fields,
    )


def _attach(model: LlamaForCausalLM, settings: dict[str, Any], *, functions: bool) -> SparseTuning:
    """Attach the method; the SpIEL cases start from given entries instead of a density."""
    spec = _spec(settings)
    if "init" not in settings:
        tuning = attach(model, spec, functions=functions)
        tuning.begin_selection(1 if settings["selection"] == "first micro-step" else spec.gradient_accumulation)
        return tuning
    start = load_file(GOLDEN_DIR / settings["init"])
    entries = []
    for name, parameter in model.named_parameters():
        if name in start:
            indices = start[name].sort().values.to(index_dtype(parameter.numel()))
            entries.append(ActiveEntries(name, parameter, len(indices)))
            entries[-1].place(indices)
    return SparseTuning(model, entries, spec, functions=functions)


@dataclass
class Outcome:
    """What a run of a case gave: the entries, the loss of every micro-step, entries replaced by step."""

    entries: list[ActiveEntries]
    losses: list[float]
    replaced: dict[str, int]


def _train(model: LlamaForCausalLM, settings: dict[str, Any], batches: torch.Tensor, *, functions: bool) -> Outcome:
    accumulation = settings["accumulation"]
    tuning = _attach(model, settings, functions=functions)
    betas = tuple(settings.get("betas", (0.9, 0.999)))
    optimizer = build_optimizer(tuning.entries, tuning.spec, betas=betas, eps=settings.get("eps"))
    tuning.begin_reselection(optimizer, settings["steps"])
    outcome = Outcome(tuning.entries, [], {})
    for step in range(1, settings["steps"] + 1):
        if tuning.spiel:
            tuning.spiel.begin_step(step)
        for micro_step in range((step - 1) * accumulation, step * accumulation):
            ids = batches[micro_step % BATCHES]
            loss = model(input_ids=ids, labels=ids).loss
            outcome.losses.append(float(loss.detach()))
            (loss / accumulation).backward()
            tuning.end_micro_step()
        optimizer.step()
        optimizer.zero_grad()
        tuning.write_back()
        if tuning.spiel and (done := tuning.spiel.end_step(step, 1.0)):
            outcome.replaced[str(step)] = done.replaced
    return outcome


@pytest.mark.parametrize("way", ["hook", "function"])
@pytest.mark.parametrize("case", _cases())
def test_reproduces_golden_trace(case: str, way: str, fixture: dict[str, torch.Tensor]) -> None:
    body = json.loads((GOLDEN_DIR / f"{case}.json").read_text())
    expected = load_file(GOLDEN_DIR / f"{case}.safetensors")
    model = _model(fixture, body["settings"])
    outcome = _train(model, body["settings"], fixture["batches"], functions=way == "function")

    torch.testing.assert_close(torch.tensor(outcome.losses), torch.tensor(body["micro_loss"]), atol=1e-4, rtol=0)
    assert outcome.replaced == pytest.approx(body["reselect"] or {}, rel=0.005)
    for entry in outcome.entries:
        found, wanted = entry.placed.long(), expected[f"{entry.name}.indices"].long()
        shared = found[torch.isin(found, wanted)]
        assert len(found) - len(shared) <= 0.005 * len(wanted), f"{entry.name}: other entries are active"
        if f"{entry.name}.final_weight" in expected:
            final = expected[f"{entry.name}.final_weight"].to(entry.weight)
            torch.testing.assert_close(entry.weight.detach(), final, atol=1e-5, rtol=0)
        else:
            dense = torch.zeros(entry.weight.numel(), dtype=torch.float64)
            dense[wanted] = expected[f"{entry.name}.values"].double()
            ours = torch.zeros_like(dense)
            ours[found] = entry.values.detach().double()
            torch.testing.assert_close(ours[shared], dense[shared], atol=1e-5, rtol=0)


def test_golden_folder_has_cases() -> None:
    assert _cases(), f"{GOLDEN_DIR} holds no case that this version can run"
