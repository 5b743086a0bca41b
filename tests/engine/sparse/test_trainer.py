"""Inside transformers' Trainer the values become those of our own loop on the same batches."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from engine.sparse.attach import SparseTuning, attach
from engine.sparse.optim import clip_gradient
from engine.sparse.optimizers import build_optimizer
from engine.sparse.trainer import MicroSteps, TuningOptimizer
from engine.spec import RunSpec
from engine.spec_rules import selects_in

STEPS, ROWS = 6, 2


def _rows(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 128, (count, 12), generator=torch.Generator().manual_seed(9))
    return [{"input_ids": row, "labels": row} for row in ids]


def _our_loop(model: LlamaForCausalLM, spec: RunSpec, rows: list[dict[str, torch.Tensor]]) -> SparseTuning:
    tuning = attach(model.train(), spec)
    optimizer = build_optimizer(tuning.entries, spec)
    tuning.begin_reselection(optimizer, STEPS)
    batches = torch.stack([row["input_ids"] for row in rows]).view(STEPS, spec.gradient_accumulation, ROWS, -1)
    for step, micro_batches in enumerate(batches, 1):
        if selects_in(step, spec):
            tuning.begin_selection(spec.gradient_accumulation)
        if tuning.spiel:
            tuning.spiel.begin_step(step)
        for ids in micro_batches:
            (model(input_ids=ids, labels=ids).loss / len(micro_batches)).backward()
            tuning.end_micro_step()
        _, clip = clip_gradient(tuning.values, spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        tuning.write_back()
        if tuning.spiel:
            tuning.spiel.end_step(step, clip)
    return tuning


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "sift"},
        {"method": "sift", "reselection_period": 2, "allocation": "global", "max_steps": STEPS},
        {"method": "spiel-ag"},
        {"method": "spiel-ag", "allocation": "global"},
        {"method": "spiel-ma"},
    ],
    ids=str,
)
def test_trainer_gives_the_values_of_our_loop(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, fields: dict[str, Any], accumulation: int
) -> None:
    spec = RunSpec(
        model="tiny",
        **fields,
        density=0.05,
        learning_rate=1e-2,
        gradient_accumulation=accumulation,
        period=3,
        estimation_steps=2,
    )
    rows = _rows(STEPS * ROWS * accumulation)
    expected = _our_loop(copy.deepcopy(tiny_llama).double(), spec, rows)
    model = tiny_llama.double()
    tuning = attach(model, spec)
    optimizer = TuningOptimizer(tuning, STEPS)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, constant), callbacks=[MicroSteps(tuning)]
    ).train()
    for ours, theirs in zip(expected.entries, tuning.entries, strict=True):
        assert torch.equal(ours.placed, theirs.placed), ours.name
        torch.testing.assert_close(theirs.values, ours.values, atol=1e-10, rtol=0)
        torch.testing.assert_close(theirs.weight, ours.weight, atol=1e-10, rtol=0)
