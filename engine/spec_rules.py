"""What holds between the fields of a spec: choices that follow from others, and combinations that cannot be."""

from typing import Literal

from engine.spec import BASELINES, RunSpec


def optimizer_of(spec: RunSpec) -> Literal["adamw", "sm3", "sgd"]:
    """Return the optimizer of a run, with `auto` resolved."""
    if spec.optimizer != "auto":
        return spec.optimizer
    return "sm3" if spec.method == "spiel-ma" else "adamw"


def rule_problems(spec: RunSpec) -> dict[str, str]:
    """Return what is wrong between fields: name of the field to mend, and the sentence."""
    problems = {}
    if spec.method == "spiel-ma" and optimizer_of(spec) != "sm3":
        problems["optimizer"] = (
            f"optimizer must be sm3 for spiel-ma, which grows by its accumulators, got {spec.optimizer!r}. "
            "Use optimizer=auto, or method=spiel-ag."
        )
    if spec.method == "spiel-ag" and optimizer_of(spec) != "adamw":
        problems["optimizer"] = (
            f"optimizer must be adamw for spiel-ag, which seeds its moments, got {spec.optimizer!r}. "
            "Use optimizer=auto."
        )
    if spec.method in BASELINES and optimizer_of(spec) == "sm3":
        problems["optimizer"] = (
            f"optimizer must be adamw or sgd for {spec.method}, as sm3 works on sparse entries, got 'sm3'. "
            "Use optimizer=auto."
        )
    if spec.method == "full" and spec.quantization == "nf4":
        problems["quantization"] = (
            "quantization must be none for full, which trains the weights themselves, got 'nf4'. "
            "Use quantization=none, or method=lora."
        )
    if spec.estimation_steps > spec.period:
        problems["estimation_steps"] = (
            f"estimation_steps must be at most period, got {spec.estimation_steps} and {spec.period}. Raise period."
        )
    return problems
