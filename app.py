"""Sparse tuning: parse arguments, build the interface, launch it."""

import argparse
import logging
import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: it asks the network otherwise

from engine import presets, runs, workers
from engine.errors import EngineError
from engine.runs import Run
from sparse_ui.context import AppContext, Settings
from sparse_ui.layout import build_app
from sparse_ui.messages import explain
from sparse_ui.server import Door, first_free_port, is_loopback, launch_arguments

POLL_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the app until Ctrl-C; return the exit status."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    root = Path(options.runs).expanduser().absolute()
    try:
        port = first_free_port(options.host, options.port)
        door = Door(options.host, port, options.password)
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        return 2
    ended = _on_interrupt()
    runs.reconcile(root)
    if options.demo:
        threading.Thread(target=_run_demo, args=(root,), daemon=True).start()
    context = AppContext(Settings(root, first_tab="train" if options.demo else "setup"))
    build_app(context).launch(**launch_arguments(door))
    address = f"http://{f'[{door.host}]' if ':' in door.host else door.host}:{port}"
    print(f"Sparse tuning is at {address}", flush=True)
    if not options.no_browser and is_loopback(door.host):
        webbrowser.open(address)
    while not ended.wait(1.0):  # a wait without end would keep Python from handling the signal on some systems
        pass
    context.chat.close()
    context.tracer.close()
    if (live := context.live_run()) is not None:
        print(f"Run {live.id} goes on without the app; start the app again to see it.", flush=True)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app.py", description="Fine-tune a language model sparsely, in the browser.")
    parser.add_argument("--demo", action="store_true", help="start the demo run at once and show it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="first port to try (default: %(default)s; 0: any)")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where the runs lie (default: %(default)s)")
    parser.add_argument("--password", help="asked for in the browser; needed for any host but this computer")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    return parser.parse_args(arguments)


def _run_demo(root: Path) -> None:
    """Start the demo run, wait for its end, and say in a line how it went."""
    try:
        run = workers.start_run(presets.load_preset("demo").model_copy(update={"output": str(root)}))
    except EngineError as error:
        print(f"The demo did not start: {explain(error, 'starting the demo').text}", flush=True)
        return
    workers.wait_for_end(run, POLL_S)
    runs.reconcile(root)
    print(demo_sentence(run) if runs.read_status(run).state == "finished" else _failure(run), flush=True)


def demo_sentence(run: Run) -> str:
    """Return the result of a finished run in a line."""
    report = runs.read_report(run)
    base, tuned = (report["exact_match"][side] for side in ("base", "tuned"))
    figures = [f"{side} {share:.2f}" for side, share in (("base", base), ("tuned", tuned)) if share is not None]
    match = f": exact match {', '.join(figures)}" if figures else ""
    return f"Demo finished{match} ({report['steps']} steps, {report['train_seconds']:.0f} s)."


def _failure(run: Run) -> str:
    status = runs.read_status(run)
    return f"Demo {status.state} at step {status.step}: {status.detail or 'by request'}".rstrip(".") + "."


def _on_interrupt() -> threading.Event:
    """Return an event that Ctrl-C and a polite kill set."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    return ended


if __name__ == "__main__":
    sys.exit(main())
