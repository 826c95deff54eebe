"""The search: which candidate of which kernel is measured next, until trials or time are used up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np

from .database import Database, Record
from .measure import Measured, compared
from .runner import Failure, Worker
from .space import Choices, Values, frozen, propose
from .target import Target
from .tasks import PREFILL, Task

_ROUNDS: Final = 7
_CONFIRMING: Final = 3
"""Times as many rounds decide whether what looked better is."""
_HOPELESS: Final = 4
"""Candidates without a result after which a task waits until nothing else is left."""


@dataclass(frozen=True)
class Trial:
    """One candidate that was measured, and how far the run is.

    Attributes:
        trial: its number in this run, from 1; of `trials`.
        best: the task's best share of the default's time so far, 1 for the default itself.
        total: the share of the whole workload's time in all tasks, with the best of each.
        seconds_left: of the time that was given, None without a limit.
    """

    task: Task
    record: Record
    trial: int
    trials: int
    best: float
    total: float
    seconds_left: float | None


@dataclass(frozen=True)
class Tuned:
    """What is known of a task at the end.

    Attributes:
        default: median seconds of a workload's calls of the default, None if nothing could be measured.
        best: share of it that the best candidate takes, 1 for the default itself.
        values: the best candidate's parameters.
        trials: candidates measured, in earlier runs, too.
    """

    task: Task
    default: float | None
    best: float
    values: Values
    trials: int


@dataclass
class _State:
    task: Task
    choices: Choices
    tried: set[tuple[tuple[str, int], ...]] = field(default_factory=set)
    best: Values = field(default_factory=dict)
    share: float = 1.0
    default: float | None = None
    exhausted: bool = False

    def take(self, record: Record) -> None:
        self.tried.add(frozen(record.knobs))
        if record.default and self.default is None:
            self.default = sum(b.calls * t for b, t in zip(self.task.buckets, record.default))
        if record.outcome == "better" and record.share < self.share:
            self.best, self.share = dict(record.knobs), record.share


class Search:
    """Measures candidates of several tasks with one worker or several, and keeps every result at once.

    Trials go where the workload's time is: in proportion to what a task takes of it now.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        target: Target,
        database: Database,
        *,
        trials: int,
        seconds: float | None = None,
        report: Callable[[Trial], None] = lambda trial: None,
        seed: int = 0,
    ) -> None:
        alone = sum(task.kernel in PREFILL for task in tasks) == 1
        self.states = [_State(task, target.space(task, alone)) for task in tasks]
        self.target, self.database, self.report = target, database, report
        self.trials, self.seconds, self.begin = trials, seconds, time.monotonic()
        self.rng, self.lock = np.random.default_rng(seed), threading.Lock()
        self.handed = self.done = 0
        self.error: BaseException | None = None
        self.stopped = False
        by_key = {(state.task.key, state.task.sizes): state for state in self.states}
        for record in database.read(target.key, wanted=target.version).records:
            state = by_key.get((record.task, record.sizes))
            if state is not None:
                state.take(record)

    def run(self, workers: Sequence[Worker]) -> list[Tuned]:
        """Search with these workers, which are closed at the end.

        Raises InputError where nothing can be measured or written; what was measured before is kept.
        """
        self.begin = time.monotonic()
        threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in workers]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        finally:
            self.stopped = True
            for worker in workers:
                worker.close()
        if self.error is not None:
            raise self.error
        return [Tuned(s.task, s.default, s.share, s.best, len(s.tried)) for s in self.states]

    def _work(self, worker: Worker) -> None:
        try:
            while (candidate := self._next()) is not None:
                state, values = candidate
                measured = self._measured(worker, state, values)
                if self.stopped:
                    return
                self._keep(state, _record(state.task, self.target, values, measured))
        except BaseException as error:  # the thread of `run` raises it
            self.error, self.stopped = self.error or error, True

    def _measured(self, worker: Worker, state: _State, values: Values) -> Measured | Failure:
        found = worker.measure(state.task, values, _ROUNDS)
        if isinstance(found, Measured):
            calls = [b.calls for b in state.task.buckets]
            outcome, share, *_ = compared(found, calls)
            if outcome == "better" and share < state.share and not self.stopped:
                return worker.measure(state.task, values, _ROUNDS * _CONFIRMING)
        return found

    def _next(self) -> tuple[_State, Values] | None:
        """The candidate to measure next, None when the run is over."""
        with self.lock:
            late = self.seconds is not None and time.monotonic() - self.begin >= self.seconds
            if self.stopped or late or self.handed >= self.trials:
                return None
            while open_ := [state for state in self.states if not state.exhausted]:
                state = max(open_, key=self._urgency)
                possible = partial(self.target.possible, state.task)
                values = propose(state.task, state.choices, state.best, state.tried, self.rng, possible)
                if values is not None:
                    state.tried.add(frozen(values))
                    self.handed += 1
                    return state, values
                state.exhausted = True
            return None

    def _urgency(self, state: _State) -> tuple[bool, float]:
        """Tasks of which nothing is known come first, unless all that was tried of them failed."""
        if state.default is None and len(state.tried) < _HOPELESS:
            return True, -float(len(state.tried))
        return False, (state.default or 0.0) * state.share / (len(state.tried) + 1)

    def _keep(self, state: _State, record: Record) -> None:
        with self.lock:
            self.database.append(record)
            state.take(record)
            self.done += 1
            left = None if self.seconds is None else max(0.0, self.begin + self.seconds - time.monotonic())
            known = [s for s in self.states if s.default is not None]
            whole = sum(s.default or 0.0 for s in known)
            total = sum((s.default or 0.0) * s.share for s in known) / whole if whole else 1.0
            self.report(Trial(state.task, record, self.done, self.trials, state.share, total, left))


def _record(task: Task, target: Target, values: Values, found: Measured | Failure) -> Record:
    about: dict[str, Any] = {
        "task": task.key,
        "sizes": task.sizes,
        "target": target.key,
        "version": target.version,
        "knobs": values,
    }
    if isinstance(found, Failure):
        return Record(**about, outcome=found.outcome, detail=found.detail)
    outcome, share, seconds, default = compared(found, [b.calls for b in task.buckets])
    return Record(**about, outcome=outcome, share=share, seconds=tuple(seconds), default=tuple(default))
