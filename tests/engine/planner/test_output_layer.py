"""The plan of the loss in chunks against what real steps hold, and what it saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import engine.chunked_loss
import engine.planner.output_layer
from engine.chunked_loss import output_layer
from engine.data.batches import Batch
from engine.evaluate import causal_loss
from engine.hardware import Device
from engine.planner.activations import Setting
from engine.planner.estimate import estimate
from engine.planner.output_layer import chunk_tokens, chunked_forward_bytes
from engine.planner.remedies import find_remedies
from engine.planner.shape import read_shape
from engine.sparse.gradient_costs import costs_for
from engine.spec import RunSpec
from engine.train.tuning import start_tuning
from engine.units import GIB

CPU = Device("cpu", "a CPU", 100 * GIB, 100 * GIB)
LENGTH = 256
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    ("targets", "dtype", "checkpointing"),
    [("linear", "bfloat16", True), ("linear", "float32", False), ("all", "bfloat16", True), ("all", "float32", True)],
)
def test_planned_peak_is_what_two_steps_hold(
    tmp_path: Path, live: Any, monkeypatch: pytest.MonkeyPatch, targets: str, dtype: str, checkpointing: bool
) -> None:
    for module in (engine.chunked_loss, engine.planner.output_layer):
        monkeypatch.setattr(module, "chunk_tokens", lambda vocabulary: 32)
    config = AutoConfig.for_model("llama", **CONFIG)
    config.save_pretrained(tmp_path)
    spec = RunSpec(
        model=str(tmp_path),
        method="random",
        chunked_loss=True,
        targets=targets,
        dtype=dtype,
        gradient_checkpointing=checkpointing,
        sequence_length=LENGTH,
        probe_interval=0,
        gradient_accumulation=1,
        device="cpu",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).train()
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    batch = Batch(ids, ids, torch.ones_like(ids), LENGTH)
    costs_for(torch.device("cpu"), model.dtype, model.lm_head.weight.numel())  # measured once a machine, not in a step
    with live:
        for parameter in model.parameters():
            live.add(parameter.detach())
        tuning = start_tuning(model, spec)
        optimizer = tuning.make_optimizer()
        for _ in range(2):
            causal_loss(model, batch, LENGTH, torch.device("cpu"), output_layer(model)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tuning.write_back()
    plan = estimate(spec, read_shape(str(tmp_path)), CPU)
    planned = plan.peak_bytes - plan.parts["workspace"] - plan.parts["context"]
    assert planned == pytest.approx(live.peak, rel=0.03)


def test_chunks_come_first_among_the_remedies_and_lift_the_length(config_folder: Callable[..., str]) -> None:
    folder = config_folder(vocab_size=128_256, num_key_value_heads=8, intermediate_size=14_336)
    spec = RunSpec(model=folder, sequence_length=8192, gradient_checkpointing=True, density=0.005)
    card, shape = Device("cuda:0", "a card of 24 GiB", 24 * GIB, 24 * GIB), read_shape(folder)
    plan = estimate(spec, shape, card)
    assert (plan.verdict, plan.phase) == ("does not fit", "loss")
    first = find_remedies(spec, shape, card, plan)[0]
    assert first.changes == {"chunked_loss": True}
    assert first.saved_bytes > GIB


@pytest.mark.parametrize(("tokens", "chunk"), [(512, 64), (16_384, 2048), (65_536, 8192)])
def test_on_a_gpu_the_chunk_may_be_that_of_liger_kernel(
    config_folder: Callable[..., str], tokens: int, chunk: int
) -> None:
    shape = read_shape(config_folder(vocab_size=32_000, hidden_size=4096))
    setting = Setting(rows=1, length=tokens, element_bytes=2, kernel="flash", checkpointing=True)
    logits = chunked_forward_bytes(shape, setting, head_trained=False) - 2 * 4096 * tokens
    own = 32_000 * (2 + 4) * chunk_tokens(32_000)
    # Its fused_linear_cross_entropy.py: for ex: BT = 4096*4, V = 32000, H = 4096 ==> inc_factor = 8, chunk_size = 2048.
    assert logits == max(own, 32_000 * 2 * chunk)


def test_a_family_that_is_not_known_saves_nothing(config_folder: Callable[..., str]) -> None:
    folder = config_folder(model_type="novel")
    plans = [
        estimate(RunSpec(model=folder, chunked_loss=chunked), read_shape(folder), CPU) for chunked in (False, True)
    ]
    assert plans[0].peak_bytes == plans[1].peak_bytes
