"""Plans: parts that add up, verdicts that follow the budget, remedies that save what they say."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BudgetError, DeviceError, InvalidSpecError, TargetsError
from engine.hardware import Device, Gpu
from engine.planner import formulas
from engine.planner.estimate import estimate
from engine.planner.plan import LABELS, make_plan, plan_table, require_fit
from engine.planner.remedies import find_remedies
from engine.planner.row_lengths import RowLengths
from engine.planner.shape import read_shape
from engine.spec import RunSpec
from engine.units import GIB

CARD = Device("cuda:0", "a card of 24 GiB", 24 * GIB, 24 * GIB)


def _spec(model: str, **fields: Any) -> RunSpec:
    return RunSpec(model=model, **{"sequence_length": 2048, **fields})


def test_the_parts_add_up_to_the_peak(config_folder: Callable[..., str]) -> None:
    plan = make_plan(_spec(config_folder(), device="cpu"))
    assert tuple(plan.parts) == tuple(LABELS)
    assert sum(plan.parts.values()) == plan.peak_bytes
    assert plan.lower_bytes < plan.peak_bytes < plan.upper_bytes
    assert sum(size for _, size in plan_table(plan)) == plan.peak_bytes


@pytest.mark.parametrize(
    ("family", "task", "longest"),
    [("gpt2", "causal", 64), ("gptj", "causal", 64), ("bert", "classification", 64), ("roberta", "classification", 62)],
)
def test_no_row_is_longer_than_a_table_of_positions(family: str, task: str, longest: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 80}
    config = {"model_type": family, **sizes, "intermediate_size": 64, "max_position_embeddings": 64, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    spec = RunSpec(model=str(tmp_path), task=task, device="cpu", sequence_length=longest)
    assert make_plan(spec).peak_bytes
    longer = spec.model_copy(update={"sequence_length": longest + 1})
    with pytest.raises(InvalidSpecError, match=f"sequence_length must be at most {longest}, the positions that"):
        make_plan(longer, lengths=RowLengths(8, 10, 10.0))  # of the rows to train on; those held out may be longer


def test_a_plan_is_plain_json(config_folder: Callable[..., str]) -> None:
    body = make_plan(_spec(config_folder(), device="cpu", budget_gib=8)).to_dict()
    assert json.loads(json.dumps(body)) == json.loads(json.dumps(body)) != {}
    assert {"gradient_checkpointing": True} in [remedy["changes"] for remedy in body["remedies"]]


JSON_KEYS = {
    "parts",
    "parts_after_forward",
    "peak_bytes",
    "lower_bytes",
    "upper_bytes",
    "reserved_bytes",
    "minimum_bytes",
    "phase",
    "verdict",
    "remedies",
}


def test_the_json_has_every_part_at_the_peak_and_after_the_forward(config_folder: Callable[..., str]) -> None:
    body = make_plan(_spec(config_folder()), card="RTX 4090 24 GB").to_dict()
    assert body.keys() >= JSON_KEYS
    assert list(body["parts_after_forward"]) == list(body["parts"]) == list(LABELS)
    allocated = body["peak_bytes"] - body["parts"]["context"]
    assert allocated <= body["minimum_bytes"] <= body["reserved_bytes"] < 1.1 * allocated


@pytest.mark.parametrize(("checkpointing", "published"), [(False, 35.72), (True, 0.81)])
def test_the_published_table_comes_out_after_the_forward(checkpointing: bool, published: float) -> None:
    """SIFT, Table 1 (arXiv:2312.11875), GiB; its gradients are in bf16, two bytes an entry."""
    fields = {"density": 0.05, "targets": "all", "attention": "eager", "gradient_checkpointing": checkpointing}
    plan = make_plan(_spec("huggyllama/llama-7b", **fields), card="A100 80 GB")
    after = plan.parts_after_forward
    found = [after["parameters"], 2 * plan.num_active, after["optimizer_states"], after["saved_activations"]]
    assert [size / GIB for size in found] == pytest.approx([12.55, 0.626, 2.51, published], rel=0.01)
    assert after["gradients"] == 4 * plan.num_active  # ours are fp32


def test_seven_billion_parameters_train_on_24_gib_with_checkpointing(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), density=0.05, gradient_checkpointing=True, selection_memory_gib=100)
    plan = estimate(spec, read_shape(spec.model), CARD)
    assert (plan.verdict, plan.parts["parameters"]) == ("fits", 2 * 6_738_415_616)
    assert plan.num_active == pytest.approx(0.05 * plan.target_numel, rel=1e-4)
    assert plan.host_bytes > 4 * plan.target_numel


def test_the_verdict_follows_the_budget(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), gradient_checkpointing=True)
    shape = read_shape(spec.model)
    plan = estimate(spec, shape, CARD)
    budgets = {"fits": plan.upper_bytes, "tight": plan.peak_bytes, "does not fit": plan.peak_bytes - 1}
    for verdict, budget in budgets.items():
        assert estimate(spec, shape, replace(CARD, free_bytes=budget)).verdict == verdict


def test_each_remedy_saves_what_it_says(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), micro_batch_size=4, budget_gib=20)
    shape = read_shape(spec.model)
    plan = estimate(spec, shape, CARD)
    remedies = find_remedies(spec, shape, CARD, plan)
    assert remedies
    for remedy in remedies:
        changed = estimate(spec.model_copy(update=remedy.changes), shape, CARD)
        assert remedy.saved_bytes == plan.peak_bytes - changed.peak_bytes > 0


def test_remedies_come_in_the_order_of_their_cost(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), micro_batch_size=4, density=0.1)
    shape = read_shape(spec.model)
    plan = estimate(spec, shape, replace(CARD, free_bytes=20 * GIB))
    fields = [next(iter(remedy.changes)) for remedy in find_remedies(spec, shape, CARD, plan)]
    order = ["chunked_loss", "gradient_checkpointing", "micro_batch_size", "sequence_length", "density", "targets"]
    assert [field for field in fields if field in order][: len(order)] == [field for field in order if field in fields]


def test_a_smaller_micro_batch_keeps_the_effective_batch(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), micro_batch_size=6, gradient_accumulation=2, gradient_checkpointing=True)
    shape = read_shape(spec.model)
    plan = estimate(spec, shape, replace(CARD, free_bytes=17 * GIB))
    changes = next(r.changes for r in find_remedies(spec, shape, CARD, plan) if "micro_batch_size" in r.changes)
    assert changes["micro_batch_size"] * changes["gradient_accumulation"] == 12


def test_a_plan_that_fits_has_no_remedies(config_folder: Callable[..., str]) -> None:
    plan = make_plan(_spec(config_folder(), device="cpu", budget_gib=500))
    assert (plan.verdict, plan.remedies) == ("fits", ())
    require_fit(plan)


def test_what_does_not_fit_is_refused_with_remedies(config_folder: Callable[..., str]) -> None:
    plan = make_plan(_spec(config_folder(), device="cpu", dtype="bfloat16", budget_gib=24))
    with pytest.raises(
        BudgetError,
        match=r"about \d+\.\d GiB and the budget is 24\.0 GiB: .*recompute as little as fits.* raise budget_gib",
    ):
        require_fit(plan)


def test_changes_that_are_enough_together_read_as_one(config_folder: Callable[..., str]) -> None:
    plan = make_plan(_spec(config_folder()), card="RTX 3050 8 GB")
    *_, together = plan.remedies
    assert re.fullmatch(r"([^;]+, )*[^;]+ and [^;]+ together", together.title)
    with pytest.raises(BudgetError, match=rf": {together.title} \(saves \d+\.\d GiB\), or raise budget_gib"):
        require_fit(plan)


def test_processes_that_share_main_memory_are_named(config_folder: Callable[..., str]) -> None:
    plan = make_plan(_spec(config_folder(), device="cpu", budget_gib=4, num_processes=2))
    with pytest.raises(BudgetError, match="share main memory: lower num_processes"):
        require_fit(plan)


def test_what_cannot_be_made_to_fit_is_said(config_folder: Callable[..., str]) -> None:
    plan = make_plan(_spec(config_folder(), device="cpu", budget_gib=4))
    with pytest.raises(BudgetError, match="no change of its settings makes it fit"):
        require_fit(plan)


def test_summing_the_selection_over_micro_batches_takes_main_memory(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), device="cpu", sequence_length=128, gradient_accumulation=1, selection_memory_gib=100)
    one = make_plan(spec, with_remedies=False)
    many = make_plan(spec.model_copy(update={"gradient_accumulation": 4}), with_remedies=False)
    assert many.phase == "selection"
    assert many.peak_bytes - one.peak_bytes > 3 * one.target_numel
    passes = make_plan(
        spec.model_copy(update={"gradient_accumulation": 4, "selection_memory_gib": 2}), with_remedies=False
    )
    assert many.peak_bytes - passes.peak_bytes == pytest.approx(4 * one.target_numel - 2 * GIB, rel=0.01)


def test_entries_that_leave_the_choice_are_planned_for(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), density=0.01, gradient_accumulation=1, max_steps=41)
    shape = read_shape(spec.model)
    once = estimate(spec, shape, CARD)
    again = estimate(spec.model_copy(update={"reselection_period": 10}), shape, CARD)
    assert again.host_bytes - once.host_bytes == 4 * (4 + 4 + 2) * once.num_active
    assert again.parts["optimizer_states"] == 3 * 4 * once.num_active


def test_more_entries_than_the_targets_have_are_refused(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), device="cpu", num_trainable=10**11)
    with pytest.raises(TargetsError, match=r"at most 6,476,005,376, the entries of the targets, got 100,000,000,000"):
        make_plan(spec)


def test_other_families_have_a_wide_range_and_say_so(config_folder: Callable[..., str]) -> None:
    known = make_plan(_spec(config_folder(), device="cpu"))
    for family, word in (("phi3", "not checked"), ("novel", "guessed")):
        plan = make_plan(_spec(config_folder(model_type=family), device="cpu"))
        assert not plan.exact
        assert word in plan.note
        assert plan.upper_bytes - plan.lower_bytes > known.upper_bytes - known.lower_bytes


@pytest.mark.parametrize(("length", "verdict"), [(64, "fits"), (4096, "does not fit")])
def test_a_plan_takes_milliseconds(config_folder: Callable[..., str], length: int, verdict: str) -> None:
    spec, taken = _spec(config_folder(), sequence_length=length), []
    for step in range(6):  # of a slider
        moved = spec.model_copy(update={"density": 0.01 + step / 1000})
        started = time.process_time()
        assert make_plan(moved, card="RTX 4090 24 GB").verdict == verdict
        taken.append(time.process_time() - started)
    assert min(taken) < 0.02


def test_several_processes_share_the_step_and_each_needs_a_card(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), density=0.05, gradient_checkpointing=True, selection_memory_gib=1000)
    shape = read_shape(spec.model)
    one, two = (estimate(spec.model_copy(update={"num_processes": count}), shape, CARD) for count in (1, 2))
    assert two.peak_bytes - one.peak_bytes == formulas.NCCL_BYTES
    assert two.exchanged_bytes == 4 * one.num_active
    assert (two.rows, two.tokens, two.flops) == (2 * one.rows, 2 * one.tokens, 2 * one.flops)
    assert two.host_bytes == 2 * one.host_bytes
    assert one.exchanged_bytes == 0


def test_the_exchange_is_a_moment_of_its_own(config_folder: Callable[..., str]) -> None:
    """Of a full tuning the joined gradients are more than any backward adds."""
    spec = _spec(config_folder(), method="full", num_processes=2, sequence_length=64, gradient_checkpointing=True)
    plan = estimate(spec, read_shape(spec.model), CARD)
    assert plan.phase == "exchange of gradients"
    assert plan.parts["transients"] == plan.exchanged_bytes == 4 * plan.target_numel


def test_processes_on_the_cpu_share_its_memory(config_folder: Callable[..., str]) -> None:
    one, two = (make_plan(_spec(config_folder(), device="cpu", num_processes=count)) for count in (1, 2))
    assert two.budget_bytes == one.budget_bytes // 2


def test_more_processes_than_cards_are_refused(
    config_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Gpu(0, "a card", 24 * GIB, 24 * GIB, None)
    for module in ("engine.hardware", "engine.planner.plan"):
        monkeypatch.setattr(f"{module}.list_gpus", lambda: [card])
    with pytest.raises(DeviceError, match="num_processes must be at most 1, the GPUs of this computer, got 2"):
        make_plan(_spec(config_folder(), num_processes=2))
    assert make_plan(_spec(config_folder(), num_processes=2, device="cpu")).rows == 32
    assert make_plan(_spec(config_folder(), num_processes=2), card="RTX 4090 24 GB").rows == 32


def test_a_model_that_turns_by_position_reads_rows_of_any_length(config_folder: Callable[..., str]) -> None:
    make_plan(_spec(config_folder(max_position_embeddings=64), sequence_length=65))
