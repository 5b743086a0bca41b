"""The figures at the end of a run, and the rate that later plans take their time from."""

import math
import statistics
from dataclasses import asdict
from typing import Any

from engine.events import Evaluated, RunState, Stepped
from engine.hardware import resolve_device
from engine.models import resolve_dtype
from engine.planner.calibration import Rate, store_rate
from engine.planner.plan import Plan
from engine.runs import Run, read_events, write_json
from engine.train.head import HeadedTuning
from engine.train.loop import Trainer

_RATED_STEPS = 5  # fewer steps than these say little of a rate
_WARM_STEPS = 2  # the first steps also choose entries and fill caches


def write_report(
    run: Run, trainer: Trainer, base: Evaluated, tuned: Evaluated | None, plan: Plan, state: RunState
) -> None:
    """Write report.json, with the planned and the measured peak side by side, and keep the rate of the run.

    Args:
        run: that ended.
        trainer: at its last step.
        base: figures of the untuned base.
        tuned: figures of the result; None where the run was stopped.
        plan: at the longest batch.
        state: that the run ends in.
    """
    spec, tuning = trainer.spec, trainer.tuning
    tokens_per_s = _tokens_per_s(run)
    report: dict[str, Any] = {
        "run": run.id,
        "state": state,
        "exact_match": {"base": base.exact_match, "tuned": tuned.exact_match if tuned else None},
        "evaluation_loss": {"base": _number(base.loss), "tuned": _number(tuned.loss) if tuned else None},
        "metrics": {"base": base.metrics, "tuned": tuned.metrics if tuned else {}},
        "train_seconds": round(trainer.elapsed_s, 2),
        "tokens_per_s": tokens_per_s,
        "peak_bytes": trainer.memory.peak_bytes(),
        "planned_peak_bytes": comparable_bytes(plan, trainer.device.type == "cuda"),
        "steps": trainer.step,
        "total_steps": trainer.total_steps,
        "num_active": tuning.num_active,
        "head_parameters": tuning.head_numel if isinstance(tuning, HeadedTuning) else 0,
        "density": tuning.num_active / tuning.target_numel,
        "model": spec.model,
        "dataset": spec.dataset,
        "method": spec.method,
        "samples": [asdict(sample) for sample in tuned.samples] if tuned else [],
    }
    write_json(run.path / "report.json", report)
    if tokens_per_s is not None:
        _keep_rate(trainer, plan, tokens_per_s)


def comparable_bytes(plan: Plan, on_gpu: bool) -> int:
    """Return the planned peak as the meter reads it: on a GPU it sees tensors, not the CUDA context."""
    return plan.peak_bytes - (plan.parts["context"] if on_gpu else 0)


def _tokens_per_s(run: Run) -> float | None:
    """Return the median over the steps of the run, its first ones left out; None where there are few."""
    rates = [record.event.tokens_per_s for record in read_events(run)[0] if isinstance(record.event, Stepped)]
    return statistics.median(rates[_WARM_STEPS:]) if len(rates) >= _RATED_STEPS + _WARM_STEPS else None


def _keep_rate(trainer: Trainer, plan: Plan, tokens_per_s: float) -> None:
    hidden = getattr(trainer.model.config.get_text_config(), "hidden_size", None)
    if not isinstance(hidden, int):
        return
    dtype = str(resolve_dtype(trainer.spec.dtype, trainer.device)).removeprefix("torch.")
    cards = trainer.peers.count if trainer.device.type == "cuda" else 1
    rate = Rate(dtype, hidden, tokens_per_s * plan.flops / plan.tokens / cards)
    try:
        store_rate(resolve_device(trainer.spec.device), rate)
    except OSError:  # a home that cannot be written: no time in later plans, and nothing else
        return


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
