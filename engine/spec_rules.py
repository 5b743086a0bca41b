"""What holds between the fields of a spec: choices that follow from others, and combinations that cannot be."""

from typing import get_args

from engine.spec import BASELINES, SELECTING, OptimizerName, Role, RunSpec

_OWN_STATES = {"sm3": "keeps one number a row and a column", "sgd": "keeps no states"}


def choosing_micro_steps(spec: RunSpec) -> int:
    """Return the micro-batches, of all processes, whose gradient chooses; for SpIEL-AG's candidates a whole step's."""
    chosen = None if spec.method == "spiel-ag" else spec.selection_micro_steps
    return chosen or spec.gradient_accumulation * spec.num_processes


def optimizer_of(spec: RunSpec) -> OptimizerName:
    """Return the optimizer of a run, with `auto` resolved."""
    if spec.optimizer != "auto":
        return spec.optimizer
    return "sm3" if spec.method == "spiel-ma" else "adamw"


def selects_in(step: int, spec: RunSpec) -> bool:
    """Return whether the entries of a run are chosen from gradients in `step`, from 1."""
    period = spec.reselection_period
    return spec.method in SELECTING and (step == 1 or (period is not None and (step - 1) % period == 0))


def entries_move(spec: RunSpec) -> bool:
    """Return whether trained entries change places, so that Adam must know the age of each."""
    return spec.method == "spiel-ag" or (spec.method in SELECTING and spec.reselection_period is not None)


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
            f"optimizer must be any but sm3 for {spec.method}, as sm3 works on sparse entries, got 'sm3'. "
            "Use optimizer=auto."
        )
    problems |= _state_problems(spec)
    if spec.method == "full" and spec.quantization == "nf4":
        problems["quantization"] = (
            "quantization must be none for full, which trains the weights themselves, got 'nf4'. "
            "Use quantization=none, or method=lora."
        )
    if spec.reselection_period is not None and spec.method in SELECTING:
        if optimizer_of(spec) not in ("adamw", "sm3", "sgd"):
            problems["optimizer"] = (
                f"optimizer must be adamw, sm3 or sgd with reselection_period, whose states can move, got "
                f"{spec.optimizer!r}. Use optimizer=auto, or leave reselection_period empty."
            )
        if spec.max_steps is None:
            problems["max_steps"] = (
                "max_steps must be given with reselection_period, got none: they say how far the result can grow. "
                "Set max_steps, or leave reselection_period empty."
            )
    if spec.allocation == "global" and spec.method == "spiel-ma":
        problems["allocation"] = (
            "allocation must be uniform for spiel-ma, whose accumulators of different weights do not compare, "
            "got 'global'. Use allocation=uniform, or method=spiel-ag."
        )
    if spec.structure != "free" and spec.allocation == "global":
        problems["structure"] = (
            "structure must be free with allocation=global, which ranks single entries over all weights, got "
            f"{spec.structure!r}. Use structure=free, or allocation=uniform."
        )
    problems |= _task_problems(spec)
    if spec.recompute in ("elementwise", "mlp") and spec.method in BASELINES:
        problems["recompute"] = (
            f"recompute must be nothing, blocks or auto for {spec.method}, whose layers are the library's own, got "
            f"{spec.recompute!r}. Use recompute=blocks, or a sparse method."
        )
    if spec.recompute_blocks is not None and spec.recompute not in ("mlp", "blocks"):
        problems["recompute_blocks"] = (
            f"recompute_blocks must be empty with recompute={spec.recompute}, which counts no blocks, got "
            f"{spec.recompute_blocks}. Leave it empty, or use recompute=mlp or recompute=blocks."
        )
    problems |= _process_problems(spec)
    if spec.estimation_steps > spec.period:
        problems["estimation_steps"] = (
            f"estimation_steps must be at most period, got {spec.estimation_steps} and {spec.period}. Raise period."
        )
    return problems


def _process_problems(spec: RunSpec) -> dict[str, str]:
    """Return what is wrong with the settings of several processes."""
    problems, count, selecting = {}, spec.num_processes, spec.selection_micro_steps
    if count > 1 and ":" in spec.device:
        problems["device"] = (
            f"device must be auto, cuda or cpu with num_processes={count}, which takes the first {count} cards, got "
            f"{spec.device!r}. Use device=cuda, or num_processes=1."
        )
    if spec.method in SELECTING and selecting is not None and selecting % count:
        problems["selection_micro_steps"] = (
            f"selection_micro_steps must be a multiple of num_processes, which share them, got {selecting} and "
            f"{count}. Use selection_micro_steps={-(-selecting // count) * count}."
        )
    return problems


def _state_problems(spec: RunSpec) -> dict[str, str]:
    """Return what is wrong with the settings that only some optimizers have."""
    problems, optimizer = {}, optimizer_of(spec)
    if optimizer != "adamw":
        why = f"of {optimizer}, which {_OWN_STATES.get(optimizer, 'is torch as it stands')}"
        if spec.optimizer_states != "float32":
            problems["optimizer_states"] = (
                f"optimizer_states must be float32 {why}, got {spec.optimizer_states!r}. "
                "Use optimizer_states=float32, or optimizer=adamw."
            )
        if spec.offload_states:
            problems["offload_states"] = (
                f"offload_states must be false {why}, got true. Use offload_states=false, or optimizer=adamw."
            )
    elif spec.optimizer_states == "compact" and spec.method in BASELINES:
        problems["optimizer_states"] = (
            f"optimizer_states must be float32 or 8bit for {spec.method}, which trains no sparse entries, got "
            "'compact'. Use optimizer_states=8bit."
        )
    elif spec.optimizer_states == "compact" and spec.quantization == "none" and spec.dtype != "bfloat16":
        problems["dtype"] = (
            "dtype must be bfloat16 for optimizer_states=compact, where the base holds half of each value, got "
            f"{spec.dtype!r}. Use dtype=bfloat16, quantization=nf4, or optimizer_states=8bit."
        )
    if optimizer == "rprop" and spec.weight_decay:
        problems["weight_decay"] = (
            f"weight_decay must be 0 for rprop, which reads the sign of the gradient only, got {spec.weight_decay:g}. "
            "Use weight_decay=0, or another optimizer."
        )
    return problems


def _task_problems(spec: RunSpec) -> dict[str, str]:
    fitting = (
        ("auto", "classification") if spec.task == "classification" else ("auto", "instruction", "messages", "text")
    )
    problems = {}
    if spec.dataset_format not in fitting:
        problems["dataset_format"] = (
            f"dataset_format must be one of {', '.join(fitting)} for task={spec.task}, got {spec.dataset_format!r}. "
            "Use dataset_format=auto, or the other task."
        )
    own = (
        {"text", "text_pair", "label"}
        if spec.task == "classification"
        else set(get_args(Role)) - {"text_pair", "label"}
    )
    if foreign := [role for role in spec.columns if role not in own]:
        problems["columns"] = (
            f"columns must name roles of task={spec.task}, got {foreign[0]!r}. Use {', '.join(sorted(own))}, "
            "or the other task."
        )
    return problems
