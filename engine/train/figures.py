"""What the steps of a run say of themselves, read off the device together.

Loss and gradient norm of a step are numbers on its device. Whoever looks at one waits for all that was queued before,
and the device then waits for the host. So they are kept until the next look, every `logging_interval` steps, which
brings all of them over in one transfer; each step is still reported with its own figures. A number that is not finite
is found at the look.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import TrainingError
from engine.events import Event, Probed, Selected, Stepped
from engine.sparse.attach import SparseTuning
from engine.sparse.peers import ALONE, Peers
from engine.sparse.probe import GradientProbe
from engine.spec import RunSpec


@dataclass(frozen=True)
class StepFigures:
    """The figures of one step, not looked at.

    `losses`, of each micro-batch of this process, and `norm`, of the gradient before clipping, are 0-dim tensors where
    they were computed; the norm is NaN where another gradient by which the step chose is not finite.
    """

    step: int
    losses: tuple[Tensor, ...]
    norm: Tensor
    learning_rate: float
    tokens: int
    memory_bytes: int
    peak_bytes: int


def read_figures(steps: Sequence[StepFigures], peers: Peers) -> list[tuple[float, float]]:
    """Return the loss, over all processes, and the norm of each of `steps`, in one transfer from the device."""
    if not steps:
        return []
    numbers = torch.stack([number.detach() for each in steps for number in (*each.losses, each.norm)]).cpu()
    found = iter([float(number) for number in numbers])
    figures = [(sum(next(found) for _ in each.losses), next(found)) for each in steps]
    losses = peers.totals([loss for loss, _ in figures])
    return [(loss, norm) for loss, (_, norm) in zip(losses, figures, strict=True)]


def require_finite_loss(step: int, loss: float, spec: RunSpec) -> None:
    """Do nothing where the loss of `step` is finite.

    Raises:
        TrainingError: it is not.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"The loss became {loss} after step {step - 1}. Lower learning_rate (now {spec.learning_rate:g}), or "
            "set dtype=float32."
        )


def require_finite(step: int, loss: float, norm: float, spec: RunSpec) -> None:
    """Do nothing where the loss and the norm of the gradient of `step` are finite.

    Raises:
        TrainingError: they are not.
    """
    require_finite_loss(step, loss, spec)
    if not math.isfinite(norm):
        raise TrainingError(
            f"The gradient became {norm} in step {step}. Lower learning_rate (now {spec.learning_rate:g}), or set "
            "dtype=float32."
        )


class StepLog:
    """Keeps the figures of steps until they are read, and reports them.

    Time is measured from look to look, when the device is done, and shared by the steps read together.
    """

    def __init__(self, spec: RunSpec, total_steps: int, emit: Callable[[Event], None], peers: Peers) -> None:
        """Report the steps of a run of `total_steps` to `emit`; all `peers` read at the same steps."""
        self._spec, self._total_steps, self._emit, self._peers = spec, total_steps, emit, peers
        self._unread: list[StepFigures] = []
        self._started_s = self._begun_s = time.monotonic()
        self._first, self._elapsed_before_s = 0, 0.0

    def begin_session(self, step: int, elapsed_s: float) -> None:
        """Begin to train after `step`; `elapsed_s` were spent on the steps so far."""
        self._started_s, self._first, self._elapsed_before_s = time.monotonic(), step, elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Seconds spent in training, over all sessions of the run."""
        return self._elapsed_before_s + time.monotonic() - self._started_s

    def begin_step(self) -> None:
        """Say that a step begins."""
        if not self._unread:
            self._begun_s = time.monotonic()

    def add(self, figures: StepFigures) -> None:
        """Keep the figures of a step that is over."""
        self._unread.append(figures)

    def require_finite(self) -> None:
        """Do nothing where all that was kept is finite in this process; report nothing.

        Raises:
            TrainingError: it is not.
        """
        for each, (loss, norm) in zip(self._unread, read_figures(self._unread, ALONE), strict=True):
            require_finite(each.step, loss, norm, self._spec)

    def read(self) -> None:
        """Look at all that was kept, and report it.

        Raises:
            TrainingError: a loss or a gradient is not finite; the steps before are reported.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        numbers = read_figures(unread, self._peers)
        now, begun = time.monotonic(), self._begun_s
        tokens_per_s = sum(each.tokens for each in unread) / (now - begun)
        for place, (each, (loss, norm)) in enumerate(zip(unread, numbers, strict=True), 1):
            require_finite(each.step, loss, norm, self._spec)
            spent = begun + (now - begun) * place / len(unread) - self._started_s
            self._emit(
                Stepped(
                    each.step,
                    self._total_steps,
                    loss,
                    each.learning_rate,
                    norm,
                    tokens_per_s,
                    each.memory_bytes,
                    each.peak_bytes,
                    self._elapsed_before_s + spent,
                    spent / (each.step - self._first) * (self._total_steps - each.step),
                )
            )
        self._begun_s = now


def selected(step: int, tuning: SparseTuning, replaced: int) -> Selected:
    """Return the event of a choice of entries in `step`, of which `replaced` were not trained before."""
    density = tuning.num_active / tuning.target_numel
    return Selected(step, tuning.spec.method, tuning.num_active, density, replaced, tuning.gradient_share)


def probed(step: int, probe: GradientProbe) -> Probed:
    """Return the event of what `probe` measured in `step`."""
    shares = probe.overall
    tensors = {name: (item.top, item.selected, item.best) for name, item in probe.tensors.items()}
    return Probed(step, shares.top, shares.selected, shares.best, tensors)
