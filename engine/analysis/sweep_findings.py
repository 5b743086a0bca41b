"""What the runs of a sweep say: means over seeds, the spread between them, one sentence, plots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from engine.analysis.figures import groups_figure, series_figure
from engine.analysis.results import Findings, Plot
from engine.analysis.sweeps import Row

Figure = Literal["loss", "exact_match"]
_LOSS, _MATCH = "held-out loss, nats per token", "exact match, share of the answers"


@dataclass(frozen=True)
class Group:
    """The finished runs of one trial. Spreads are the largest distance of a seed from the mean."""

    labels: dict[str, str]
    rows: tuple[Row, ...]
    failed: int

    @property
    def trained(self) -> int:
        """Trained values; the same for all seeds."""
        return self.rows[0].trained or 0

    def mean(self, figure: Figure) -> float:
        """Return the mean over the seeds."""
        return fmean(self._known(figure))

    def spread(self, figure: Figure) -> float:
        """Return the largest distance from the mean."""
        return max(abs(value - self.mean(figure)) for value in self._known(figure))

    def has(self, figure: Figure) -> bool:
        """Return whether any seed has the figure."""
        return bool(self._known(figure))

    def _known(self, figure: Figure) -> list[float]:
        return [value for row in self.rows if (value := getattr(row, figure)) is not None]


def group(rows: Sequence[Row]) -> list[Group]:
    """Return the rows by trial, in order; trials of which every run failed are left out."""
    by_labels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_labels.setdefault(tuple(row.labels.values()), []).append(row)
    groups = []
    for members in by_labels.values():
        done = tuple(row for row in members if not row.error and row.loss is not None)
        if done:
            groups.append(Group(members[0].labels, done, len(members) - len(done)))
    return groups


def density_findings(rows: Sequence[Row]) -> Findings:
    """Say which method learns best with few values and with many."""
    groups = group(rows)
    methods = list(dict.fromkeys(each.labels["method"] for each in groups))
    by_method = {name: [each for each in groups if each.labels["method"] == name] for name in methods}
    ends = [
        " and ".join(
            f"{name} {_number(each, 'loss')} ({each.trained:,})"
            for name, each in ((name, choose(by_method[name])) for name in methods)
        )
        for choose in (_smallest, _largest)
    ]
    sentence = (
        f"With the fewest trained values (their number in brackets) the held-out loss is {ends[0]}; with the most, "
        f"{ends[1]}; the untuned base has {_base(groups)}."
    )
    plots = tuple(
        Plot(
            heading,
            "Mean over seeds; bars reach the seed farthest from it.",
            series_figure(
                {name: _points(each, figure, lambda one: one.trained) for name, each in by_method.items()},
                "trained values",
                words,
                log=True,
            ),
        )
        for figure, heading, words in _figures(groups, "over the number of trained values")
    )
    return Findings(*_table(groups), _whole(sentence, rows), plots)


def module_findings(rows: Sequence[Row]) -> Findings:
    """Say which weights are best trained, and whether the method matters more than the weights."""
    groups = group(rows)
    methods = list(dict.fromkeys(each.labels["method"] for each in groups))
    modules = list(dict.fromkeys(each.labels["weights"] for each in groups))
    found = {(each.labels["weights"], each.labels["method"]): each for each in groups}
    best = min(groups, key=lambda each: each.mean("loss"))
    words = [
        f"over the choices of weights {method} reaches {min(losses):.4f} to {max(losses):.4f}"
        for method in methods
        if (losses := [each.mean("loss") for each in groups if each.labels["method"] == method])
    ]
    sentence = (
        f"With {best.trained:,} trained values the lowest held-out loss is {_number(best, 'loss')}, with "
        f"{best.labels['method']} on {best.labels['weights']}; {'; '.join(words)}{_wins(found, modules, methods)}."
    )
    whole = [module for module in modules if all((module, method) in found for method in methods)]
    plots = tuple(
        Plot(
            heading,
            "Mean over seeds; bars reach the seed farthest from it.",
            groups_figure(
                whole,
                {
                    method: [(found[m, method].mean(figure), found[m, method].spread(figure)) for m in whole]
                    for method in methods
                },
                text,
            ),
        )
        for figure, heading, text in _figures(groups, "by the weights that are trained")
    )
    return Findings(*_table(groups), _whole(sentence, rows), plots)


def _wins(found: dict[tuple[str, str], Group], modules: Sequence[str], methods: Sequence[str]) -> str:
    if not {"sift", "random"} <= {*methods}:
        return ""
    both = [module for module in modules if (module, "sift") in found and (module, "random") in found]
    wins = sum(found[module, "sift"].mean("loss") < found[module, "random"].mean("loss") for module in both)
    return f"; sift is below random on {wins} of {len(both)} choices"


def schedule_findings(rows: Sequence[Row]) -> Findings:
    """Say which period and schedule did best, and whether the difference exceeds that between seeds."""
    groups = group(rows)
    best, worst = (choose(groups, key=lambda each: each.mean("loss")) for choose in (min, max))
    lines: dict[str, list[Group]] = {}
    for each in groups:
        lines.setdefault(f"{each.labels['method']}, {each.labels['schedule']}", []).append(each)
    means = ", ".join(f"{name} {fmean(each.mean('loss') for each in line):.4f}" for name, line in lines.items())
    seeds = max(len(each.rows) for each in groups)
    noise = f"; seeds differ by up to {max(each.spread('loss') for each in groups):.4f} from their mean"
    sentence = (
        f"The lowest held-out loss is {_number(best, 'loss')} with {_words(best)}, the highest "
        f"{_number(worst, 'loss')} with {_words(worst)}; over all periods the mean is {means}"
        f"{noise if seeds > 1 else ''}."
    )
    plots = tuple(
        Plot(
            heading,
            "Mean over seeds; bars reach the seed farthest from it.",
            series_figure(
                {name: _points(line, figure, lambda one: float(one.labels["period"])) for name, line in lines.items()},
                "steps between reselections",
                text,
                log=False,
            ),
        )
        for figure, heading, text in _figures(groups, "over the period")
    )
    return Findings(*_table(groups), _whole(sentence, rows), plots)


def _words(each: Group) -> str:
    return f"{each.labels['method']}, {each.labels['schedule']}, every {each.labels['period']} steps"


def _smallest(groups: Sequence[Group]) -> Group:
    return min(groups, key=lambda each: each.trained)


def _largest(groups: Sequence[Group]) -> Group:
    return max(groups, key=lambda each: each.trained)


def _base(groups: Sequence[Group]) -> str:
    known = [row.base_loss for each in groups for row in each.rows if row.base_loss is not None]
    return f"{known[0]:.4f}" if known else "none"


def _number(each: Group, figure: Figure) -> str:
    digits = 4 if figure == "loss" else 2
    spread = f" ± {each.spread(figure):.{digits}f}" if len(each.rows) > 1 else ""
    return f"{each.mean(figure):.{digits}f}{spread}"


def _points(groups: Sequence[Group], figure: Figure, x: Callable[[Group], float]) -> list[tuple[float, float, float]]:
    return sorted((x(each), each.mean(figure), each.spread(figure)) for each in groups if each.has(figure))


def _figures(groups: Sequence[Group], words: str) -> list[tuple[Figure, str, str]]:
    found: list[tuple[Figure, str, str]] = [("loss", f"Held-out loss {words}", _LOSS)]
    if all(each.has("exact_match") for each in groups):
        found.append(("exact_match", f"Exact match {words}", _MATCH))
    return found


def _table(groups: Sequence[Group]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    matched = any(each.has("exact_match") for each in groups)
    columns = (*groups[0].labels, "trained", "rate", "held-out loss", *(("exact match",) if matched else ()), "runs")
    rows = tuple(
        (
            *each.labels.values(),
            f"{each.trained:,}",
            f"{each.rows[0].learning_rate:g}",
            _number(each, "loss"),
            *((_number(each, "exact_match") if each.has("exact_match") else "",) if matched else ()),
            f"{len(each.rows)}" + (f" ({each.failed} failed)" if each.failed else ""),
        )
        for each in groups
    )
    return columns, rows


def _whole(sentence: str, rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row.error]
    if not failed:
        return sentence
    words = ", ".join(failed[0].labels.values())
    return f"{sentence} {len(failed)} of {len(rows)} runs failed, the first ({words}) so: {failed[0].error}"
