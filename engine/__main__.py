"""The command line: `python -m engine COMMAND`. Torch stays out of this process; workers have it."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from engine import runs, workers
from engine.analysis.command import add_commands
from engine.errors import EngineError
from engine.hardware import list_gpus, resolve_device
from engine.plan_text import print_fit, print_plan, say_aside
from engine.planner.calibration import read_calibration
from engine.planner.fit import LARGEST_FIELDS
from engine.presets import find_spec_file, list_presets
from engine.progress import chat_in_terminal, follow, print_runs
from engine.spec import RunSpec, about
from engine.spec_io import apply_overrides, load_values, parse_spec
from engine.tracer import plan_by_trace
from engine.units import format_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 failed, 2 asked wrongly."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser().parse_args(arguments)
        status: int = options.command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has read enough, as `| head`; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EngineError as error:
        if "--json" in arguments:
            print(json.dumps({"state": "failed", "error": str(error)}), flush=True)
        for sentence in getattr(error, "problems", None) or [error]:
            print(f"Error: {getattr(sentence, 'message', sentence)}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as everything else here does, not as the usage of a command."""

    def error(self, message: str) -> NoReturn:
        """Take from argparse what is wrong with the arguments."""
        raise EngineError(f"{message[0].upper()}{message[1:]}. `{self.prog} --help` says what there is.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m engine", description="Sparse fine-tuning of language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    train = add("train", _train, "Train a spec in a process of its own and follow it; Ctrl-C stops the run.")
    train.add_argument("spec", nargs="?", help="YAML file or name of a preset; may be left out with --set")
    train.add_argument("--resume", metavar="RUN", help="go on with a stopped or failed run instead")
    train.add_argument("--detach", action="store_true", help="start the run and return at once")
    plan = add("plan", _plan, "Say what a spec will need, without running it; a plan that does not fit is no error.")
    plan.add_argument("spec", nargs="?", help="YAML file or name of a preset; may be left out with --set")
    plan.add_argument(
        "--card", metavar="NAME", help='plan for a card that is not here: "RTX 4090 24 GB", or any of "24 GiB"'
    )
    plan.add_argument("--fit", action="store_true", help="print the largest spec that fits, as YAML, and its plan")
    plan.add_argument(
        "--largest", choices=LARGEST_FIELDS, help="print the spec with the largest of this field that fits"
    )
    for sub in (train, plan):
        sub.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set a field of the spec")
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    listed = add("runs", _runs, "List the runs, newest first.")
    listed.add_argument("--json", action="store_true", help="print a JSON list")
    chat = add("chat", _chat, "Chat with the base and the tuned model of a run.")
    chat.add_argument("run", nargs="?", help="id or folder of a run; default: the newest that has a result")
    stop = add("stop", _stop, "Ask a run to stop after the step it is in, and to save.")
    stop.add_argument("run", help="id or folder of a run")
    compose = add("compose", _compose, "Add the results of runs over one base: a run to chat with and export.")
    compose.add_argument("run", nargs="+", help="ids or folders of two runs or more")
    compose.add_argument("--scales", type=float, nargs="+", help="a factor for each run (default: 1)")
    compose.add_argument("--evaluate", action="store_true", help="measure the sum on the held-out rows of each run")
    export = add("export", _export, "Write the result of a run as files that other tools load.")
    export.add_argument("run", help="id or folder of a run")
    export.add_argument("folder", type=Path, help="new or empty folder to write into")
    export.add_argument("--as", dest="kind", choices=("merged", "peft"), default="merged", help="default: merged")
    for sub in (listed, chat, stop, train, export, compose):
        sub.add_argument("--runs", default="runs", metavar="FOLDER", help="where the runs lie (default: runs)")
    add_commands(commands)
    probe = add("calibrate", _calibrate, "Measure this computer by a few steps of the demo, so that plans are truer.")
    probe.add_argument("--device", default="auto", help="as in a spec (default: auto)")
    probe.add_argument("--runs", default="runs", metavar="FOLDER", help="beside whose runs not (default: runs)")
    probe_worker = add("calibrate-worker", _calibrate_worker, "Used by the program itself: the probe.")
    probe_worker.add_argument("device")
    add("presets", _presets, "List the presets, which `train` and `plan` take by name.")
    add("fields", _fields, "List the fields of a spec with unit, default and meaning.")
    for name in ("worker", "chat-worker"):
        worker = add(name, _worker, "Used by the program itself: train, or chat with, the run in a folder.")
        worker.add_argument("run", type=Path)
        worker.set_defaults(module="engine.train.worker" if name == "worker" else "engine.chat")
    tracing = add("trace-worker", _trace_worker, "Used by the program itself: trace the specs that it is asked for.")
    tracing.set_defaults(module="engine.planner.trace_worker")
    return parser


def _spec_of(options: argparse.Namespace) -> RunSpec:
    values = load_values(find_spec_file(options.spec)) if options.spec else {}
    if getattr(options, "runs", "runs") != "runs":
        values["output"] = options.runs
    return parse_spec(apply_overrides(values, options.set))


def _train(options: argparse.Namespace) -> int:
    if options.resume:
        if options.spec or options.set:
            raise EngineError("A resumed run keeps its spec: leave the spec and --set away, or start a new run.")
        run = runs.open_run(options.resume, options.runs)
        runs.reconcile(run.path.parent)
        seen = run.events_path.stat().st_size if run.events_path.exists() else 0
        workers.start_worker(run)
    else:
        run, seen = workers.start_run(_spec_of(options)), 0
    if options.detach:
        print(run.path, flush=True)
        return 0
    status = follow(run, seen)
    report = workers.finish_report(run)
    if options.json:
        print(json.dumps(report), flush=True)
    return 0 if status.state == "finished" else 1


def _absent_card(spec: RunSpec) -> str | None:
    """Return a card of the size of the budget, where a GPU is asked for on a computer without one."""
    if not spec.device.startswith("cuda") or spec.budget_gib is None or list_gpus():
        return None
    return f"{spec.budget_gib:g} GiB"


def _plan(options: argparse.Namespace) -> int:
    spec = _spec_of(options)
    card = _absent_card(spec) if options.card is None else options.card
    if options.fit or options.largest:
        return print_fit(spec, card, options.largest, as_json=options.json)
    plan = plan_by_trace(spec, card=card, told=say_aside)
    if options.json:
        print(json.dumps(plan.to_dict()), flush=True)
    else:
        print_plan(plan)
    return 0


def _runs(options: argparse.Namespace) -> int:
    if options.runs != "runs" and not Path(options.runs).is_dir():
        raise EngineError(
            f"There is no folder {options.runs!r} that could hold runs. Give the one that runs were made in."
        )
    runs.reconcile(options.runs)
    found = runs.list_runs(options.runs)
    if options.json:
        print(json.dumps([workers.finish_report(run) for run in found]), flush=True)
    else:
        print_runs(found)
    return 0


def _chat(options: argparse.Namespace) -> int:
    runs.reconcile(options.runs)
    if options.run:
        run = runs.open_run(options.run, options.runs)
    else:
        ready = [run for run in runs.list_runs(options.runs) if (run.delta_path / "delta.json").exists()]
        if not ready:
            raise EngineError(f"No run under {options.runs!r} has a result yet. Train one first.")
        run = ready[0]
    return chat_in_terminal(run)


def _stop(options: argparse.Namespace) -> int:
    run = runs.open_run(options.run, options.runs)
    runs.reconcile(run.path.parent)
    if not runs.has_worker(run):
        raise EngineError(f"Run {run.id} is not at work: it is {runs.read_status(run).state}.")
    runs.send_request(run, "stop")
    print(f"{run.id} was {workers.wait_for_end(run).state}.", flush=True)
    return 0


def _compose(options: argparse.Namespace) -> int:
    composition = import_module("engine.composition")
    sources = [runs.open_run(name, options.runs) for name in options.run]
    scales = options.scales or [1.0] * len(sources)
    done = composition.compose(sources, scales, Path(options.runs), evaluate=options.evaluate)
    for line in composition.sentences(done):
        print(line, flush=True)
    print(f"{done.num_active:,} entries in {done.run.path}", flush=True)
    return 0


def _export(options: argparse.Namespace) -> int:
    run = runs.open_run(options.run, options.runs)
    done = import_module("engine.export").export(run, options.folder, options.kind)
    figures = "".join(f", {name.replace('_', ' ')} {figure:.3g}" for name, figure in done.figures.items())
    print(f"{options.kind} ({done.dtype}): {format_bytes(done.num_bytes)} in {done.folder}{figures}", flush=True)
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    workers.calibrate(options.device, options.runs)
    known = read_calibration(device)
    rate = known.rates[-1]
    print(f"{device.label}: {format_bytes(known.context_bytes or 0)} before the first tensor")
    print(f"Libraries beside the tensors: {format_bytes(known.workspace_bytes or 0)}")
    print(f"{rate.flops_per_s / 1e12:.3g} TFLOP/s in {rate.dtype} on a model {rate.hidden} wide", flush=True)
    return 0


def _calibrate_worker(options: argparse.Namespace) -> int:
    import_module("engine.train.calibrate").measure(options.device)
    return 0


def _presets(_options: argparse.Namespace) -> int:
    print("\n".join(list_presets()))
    return 0


def _fields(_options: argparse.Namespace) -> int:
    for name, field in RunSpec.model_fields.items():
        item = about(name)
        default = "required" if field.is_required() else f"default {field.default!r}"
        print(f"{name} ({', '.join(part for part in (item.unit, default) if part)})\n    {item.help}")
    return 0


def _trace_worker(options: argparse.Namespace) -> int:
    status: int = import_module(options.module).main()
    return status


def _worker(options: argparse.Namespace) -> int:
    status: int = import_module(options.module).main(runs.open_run(options.run.absolute()))
    return status


if __name__ == "__main__":
    sys.exit(main())
