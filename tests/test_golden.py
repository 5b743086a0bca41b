"""Twenty steps of each method against traces of an independent oracle: every case in the folder GOLDEN_DIR."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from engine.sparse.attach import SparseTuning, attach
from engine.sparse.optim import build_optimizer
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


def _train(model: LlamaForCausalLM, settings: dict[str, Any], batches: torch.Tensor) -> tuple[SparseTuning, list[float]]:
    spec = RunSpec(
        model="golden",
        method=settings["method"],
        density=settings["density"],
        targets=tuple(settings["targets"]),
        optimizer=settings["optimizer"],
        learning_rate=settings["lr"],
        weight_decay=settings["weight_decay"],
    )
    accumulation = settings["accumulation"]
    tuning = attach(model, spec)
    tuning.begin_selection(1 if settings["selection"] == "first micro-step" else accumulation)
    optimizer = build_optimizer(tuning.values, spec.optimizer, spec.learning_rate, spec.weight_decay)
    losses = []
    for micro_step in range(settings["steps"] * accumulation):
        ids = batches[micro_step % BATCHES]
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        (loss / accumulation).backward()
        tuning.end_micro_step()
        if (micro_step + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
            tuning.write_back()
    return tuning, losses


@pytest.mark.parametrize("case", _cases())
def test_reproduces_golden_trace(case: str, fixture: dict[str, torch.Tensor]) -> None:
    settings = json.loads((GOLDEN_DIR / f"{case}.json").read_text())
    expected = load_file(GOLDEN_DIR / f"{case}.safetensors")
    model = _model(fixture, settings["settings"])
    tuning, losses = _train(model, settings["settings"], fixture["batches"])

    torch.testing.assert_close(torch.tensor(losses), torch.tensor(settings["micro_loss"]), atol=1e-4, rtol=0)
    for entry in tuning.entries:
        found = set(entry.indices.tolist())
        wanted = set(expected[f"{entry.name}.indices"].tolist())
        assert len(found - wanted) <= 0.005 * len(wanted), f"{entry.name}: other entries were chosen"
        final = expected[f"{entry.name}.final_weight"].to(entry.weight)
        torch.testing.assert_close(entry.weight.detach(), final, atol=1e-5, rtol=0)


def test_golden_folder_has_cases() -> None:
    assert _cases(), f"{GOLDEN_DIR} holds no case that this version can run"
