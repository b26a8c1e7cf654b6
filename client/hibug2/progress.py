"""Follows a run on a terminal as live bars, elsewhere as plain lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from hibug2.v1.run_pb2 import Run, Step
    from hibug2.v1.types_pb2 import Job

# A line at every tenth of a step is enough for a log.
_TENTHS = 10
_PATIENCE_S = 0.2


def follow(runs: Iterable[Run], console: Console) -> Run | None:
    """Show each snapshot of a run on `console` and return the last one; None when there was none."""
    runs = _aside(runs)
    shown = _bars(runs, console) if console.is_terminal else _lines(runs, console)
    last = None
    for last in shown:  # noqa: B007
        pass
    return last


def _aside(runs: Iterable[Run]) -> Iterator[Run]:
    """`runs`, taken by another thread: Ctrl-C must find this one waiting, for gRPC hangs when a call is cut short."""
    queue: SimpleQueue[Run | Exception | None] = SimpleQueue()

    def take() -> None:
        try:
            for run in runs:
                queue.put(run)
        except Exception as error:  # noqa: BLE001  # raised below, in the thread that asked
            queue.put(error)
        else:
            queue.put(None)

    Thread(target=take, daemon=True).start()
    while True:
        try:
            # A Ctrl-C just before the wait does not end it: waiting is done in short pieces.
            item = queue.get(timeout=_PATIENCE_S)
        except Empty:
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        yield item


def _bars(runs: Iterable[Run], console: Console) -> Iterator[Run]:
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[facts]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[int, TaskID] = {}
        for run in runs:
            for i, step in enumerate(run.steps):
                if i not in tasks:
                    tasks[i] = progress.add_task(step_word(step), total=None, facts="")
                total = step.job.total_count or None
                done = float(step.job.done_count)
                if _state(step) in {"succeeded", "left out"}:
                    total, done = 1, 1.0
                progress.update(tasks[i], total=total, completed=done, facts=facts(step))
            yield run


def _lines(runs: Iterable[Run], console: Console) -> Iterator[Run]:
    seen: dict[int, tuple[str, int]] = {}
    for run in runs:
        for i, step in enumerate(run.steps):
            state = _state(step)
            tenth = _TENTHS * step.job.done_count // step.job.total_count if step.job.total_count else 0
            mark = (state, tenth if state == "running" else 0)
            if state != "pending" and seen.get(i) != mark:
                seen[i] = mark
                console.print(Text(f"{step_word(step)}: {facts(step)}"), soft_wrap=True)
        yield run


@contextmanager
def of_job(console: Console) -> Iterator[Callable[[Job], None]]:
    """A function that shows the snapshots of one job: its step as a live line, elsewhere a line a step."""
    if console.is_terminal:
        with console.status("") as status:
            yield lambda job: status.update(Text(_told(job)))
        return
    seen: set[str] = set()

    def tell(job: Job) -> None:
        if job.step and job.step not in seen:
            seen.add(job.step)
            console.print(Text(_told(job)), soft_wrap=True)

    yield tell


def _told(job: Job) -> str:
    count = f": {job.done_count:,} of {job.total_count:,}" if job.total_count else ""
    return f"{job.step}{count}"


def step_word(step: Step) -> str:
    """`tagging`, for people."""
    from hibug2 import messages
    from hibug2.v1 import run_pb2

    return messages.word(run_pb2.StepKind.DESCRIPTOR, step.kind)


def _state(step: Step) -> str:
    from hibug2 import messages
    from hibug2.v1 import types_pb2

    return "left out" if step.skipped else messages.word(types_pb2.JobState.DESCRIPTOR, step.job.state) or "pending"


def facts(step: Step) -> str:
    """How a step stands in words: "1,200 of 5,000, 240/s, 16 s left"."""
    job, state = step.job, _state(step)
    if state == "left out":
        return f"left out: {step.skipped}"
    if state == "succeeded":
        if job.reused:
            return "was there already"
        count = f"{job.done_count:,} " if job.done_count else ""
        seconds = step.elapsed.seconds + step.elapsed.nanos / 1e9
        return f"{count}done" + (f" in {duration(seconds)}" if seconds else "")
    if state == "failed":
        return f"failed: {job.problem.message or job.message or 'no reason given'}"
    if state != "running":
        return f"{state}: {job.message}" if job.message else state
    parts = []
    if job.total_count:
        parts.append(f"{job.done_count:,} of {job.total_count:,}")
    if job.rate_per_second > 0:
        parts.append(f"{job.rate_per_second:,.0f}/s" if job.rate_per_second >= 10 else f"{job.rate_per_second:.1f}/s")
    if job.HasField("eta"):
        parts.append(f"{duration(job.eta.seconds)} left")
    if job.message:
        parts.append(job.message)
    return ", ".join(parts) or "running"


def duration(seconds: float) -> str:
    """`0.4 s`, `16 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
