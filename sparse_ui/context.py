"""What the tabs share: the settings of the app, the reader of events, the desks that keep the processes of a person."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine import runs
from engine.runs import Run
from engine.tracer import Tracer
from sparse_ui.chat_desk import ChatDesk
from sparse_ui.errand_desk import ErrandDesk
from sparse_ui.history import HistoryReader

TabName = Literal["setup", "data", "train", "chat", "runs"]


@dataclass(frozen=True)
class Settings:
    """What the command line decides. `runs_root` holds a folder a run."""

    runs_root: Path
    first_tab: TabName = "setup"
    preset: str = "demo"


@dataclass(frozen=True)
class AppContext:
    """Owned by one `build_app`; holds no state of any run."""

    settings: Settings
    reader: HistoryReader = field(default_factory=HistoryReader)
    chat: ChatDesk = field(default_factory=ChatDesk)
    errands: ErrandDesk = field(default_factory=ErrandDesk)
    tracer: Tracer = field(default_factory=Tracer)

    def list_runs(self) -> list[Run]:
        """Return the runs, newest first."""
        return runs.list_runs(self.settings.runs_root)

    def find_run(self, run_id: str | None) -> Run | None:
        """Return the run with this id, or None where it is gone."""
        return next((run for run in self.list_runs() if run.id == run_id), None)

    def live_run(self) -> Run | None:
        """Return the run at work: one that trains before one that waits, else None."""
        live = [run for run in self.list_runs() if runs.read_status(run).is_live]
        working = [run for run in live if runs.read_status(run).state != "queued"]
        return next(iter([*working, *live]), None)

    def default_run(self) -> Run | None:
        """Return the run to look at first: the live one, else the newest."""
        return self.live_run() or next(iter(self.list_runs()), None)
