"""The search, with workers whose times are made up."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvc.tuning.database import Database
from kvc.tuning.runner import Failure
from kvc.tuning.search import Search, Trial, Tuned
from kvc.tuning.space import Values, frozen
from kvc.tuning.tasks import Bucket, Task
from kvc_passes.errors import InputError

from .tuning_cases import CPU, TARGET, TASKS, FakeWorker, product, record

FEW, MANY = TASKS["product_few"], TASKS["product_many"]


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(tmp_path)
    made.create()
    return made


def search(database: Database, tasks: list[Task], trials: int, **options: Any) -> Search:
    return Search(tasks, CPU, database, trials=trials, **options)


def even(task: Task, values: Values, n: int) -> float:
    return 1.0


def test_the_best_is_found_and_recorded(database: Database) -> None:
    """Every parameter has a value that is better; together they are the best."""
    good = {"accumulators": 16, "ahead": 32}

    def times(task: Task, values: Values, n: int) -> float:
        return 1.0 - 0.1 * sum(values.get(name) == value for name, value in good.items())

    worker = FakeWorker(times)
    (found,) = search(database, [FEW], 19).run([worker])
    assert (found.values, found.trials) == (good, 19)
    assert found.best == pytest.approx(0.8)
    assert found.default == pytest.approx(10 * 1e-3)
    records = database.read(TARGET).records
    assert len(records) == 19
    best = min((r for r in records if r.outcome == "better"), key=lambda r: r.share)
    assert best.knobs == good
    assert best.seconds == pytest.approx((0.8e-3,))
    assert best.default == pytest.approx((1e-3,))
    assert best.sizes == ((2, 0),)
    assert worker.closed == 1


def test_the_hill_is_climbed_one_parameter_after_the_other(database: Database) -> None:
    good = {"rows": 11, "depth": 256, "row_bytes": 64 * 1024, "groups": 1}
    task = product("product_many", depth=4096)

    def times(task: Task, values: Values, n: int) -> float:
        return 1.0 - 0.1 * sum(values.get(name) == value for name, value in good.items())

    (found,) = search(database, [task], 80).run([FakeWorker(times)])
    assert found.values == good


def test_what_is_within_the_noise_does_not_replace_the_default(database: Database) -> None:
    (found,) = search(database, [FEW], 19).run([FakeWorker(lambda *_: 0.97, spread=0.1)])
    assert (found.values, found.best) == ({}, 1.0)
    assert {r.outcome for r in database.read(TARGET).records} == {"even"}


def test_what_looked_better_and_is_not_when_confirmed(database: Database) -> None:
    worker = FakeWorker(lambda task, values, n: 0.7 if n == 0 else 1.2)
    (found,) = search(database, [FEW], 5).run([worker])
    assert (found.values, found.best) == ({}, 1.0)
    records = database.read(TARGET).records
    assert [r.outcome for r in records] == ["worse"] * 5
    assert len(worker.asked) == 10
    rounds = [asked[2] for asked in worker.asked]
    assert rounds[1::2] == [3 * n for n in rounds[::2]]


def test_what_is_lost_when_confirmed_is_a_failure(database: Database) -> None:
    worker = FakeWorker(lambda task, values, n: 0.7 if n == 0 else Failure("failed", "gone"))
    (found,) = search(database, [FEW], 2).run([worker])
    assert found.values == {}
    assert [(r.outcome, r.detail) for r in database.read(TARGET).records] == [("failed", "gone")] * 2


def test_what_is_not_the_best_is_not_confirmed(database: Database) -> None:
    def times(task: Task, values: Values, n: int) -> float:
        return 0.5 if values == {"accumulators": 4} else 0.9

    worker = FakeWorker(times)
    search(database, [FEW], 10).run([worker])
    assert Counter(frozen(values) for _, values, _ in worker.asked).most_common(2)[0] == (
        (("accumulators", 4),),
        2,
    )
    assert len(worker.asked) == 11


def test_trials_go_where_the_time_is(database: Database) -> None:
    """In proportion to what a task takes of the workload."""
    heavy, light = product("product_many", 96, 4096), product("product_many", 64, 4096)

    def times(task: Task, values: Values, n: int) -> float:
        return 1.0

    class Weighted(FakeWorker):
        def measure(self, task: Task, values: Values, rounds: int) -> Any:
            self.defaults = {task.kernel: 3e-3 if task == heavy else 1e-3}
            return super().measure(task, values, rounds)

    worker = Weighted(times)
    search(database, [light, heavy], 80).run([worker])
    counts = Counter(asked[0] for asked in worker.asked)
    assert counts[heavy] == pytest.approx(60, abs=2)
    assert sum(counts.values()) == 80


def test_tasks_of_which_nothing_is_known_come_first(database: Database) -> None:
    worker = FakeWorker(even)
    search(database, list(TASKS.values()), 4).run([worker])
    assert {asked[0].kernel for asked in worker.asked} == set(TASKS)


def test_a_task_whose_first_candidate_failed_is_not_given_up(database: Database) -> None:
    def times(task: Task, values: Values, n: int) -> float | Failure:
        first = sum(asked[0] == task for asked in worker.asked) == 1
        return Failure("failed", "out of luck") if first and task == MANY else 1.0

    worker = FakeWorker(times, {"product_few": 1e-4, "product_many": 1.0})
    found = search(database, [FEW, MANY], 12).run([worker])
    counts = Counter(asked[0] for asked in worker.asked)
    assert counts[MANY] > counts[FEW]
    assert all(t.default is not None for t in found)


def test_a_task_that_always_fails_does_not_take_all_trials(database: Database) -> None:
    def times(task: Task, values: Values, n: int) -> float | Failure:
        return Failure("timeout", "slow") if task == MANY else 1.0

    worker = FakeWorker(times)
    found = search(database, [FEW, MANY], 16).run([worker])
    counts = Counter(asked[0] for asked in worker.asked)
    assert counts[FEW] >= 6
    assert [t.default is None for t in found] == [False, True]


def test_a_task_all_of_whose_candidates_were_tried(database: Database) -> None:
    """The rest goes to the others; the run ends when there are none."""
    worker, size = FakeWorker(even), 4 * 5 - 1
    found = search(database, [FEW], 1000).run([worker])
    assert [t.trials for t in found] == [len(worker.asked)] == [size]
    again = FakeWorker(even)
    search(database, [FEW, MANY], 25).run([again])
    assert {asked[0] for asked in again.asked} == {MANY}
    assert len(again.asked) == 25


@pytest.mark.parametrize("trials", [1, 2, 7])
def test_no_more_candidates_than_were_asked_for(database: Database, trials: int) -> None:
    reported: list[Trial] = []
    search(database, [FEW, MANY], trials, report=reported.append).run([FakeWorker(even)])
    assert len(database.read(TARGET).records) == trials
    assert [(t.trial, t.trials) for t in reported] == [(i + 1, trials) for i in range(trials)]
    assert {t.seconds_left for t in reported} == {None}


def test_the_time_is_obeyed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("kvc.tuning.search.time.monotonic", lambda: now[0])

    def times(task: Task, values: Values, n: int) -> float:
        now[0] += 10
        return 1.0

    reported: list[Trial] = []
    search(database, [MANY], 1000, seconds=45, report=reported.append).run([FakeWorker(times)])
    assert [t.seconds_left for t in reported] == [35, 25, 15, 5, 0]
    assert len(database.read(TARGET).records) == 5


def test_what_is_reported_of_a_run(database: Database) -> None:
    """The best of a task, and of all of them by what they take."""

    def times(task: Task, values: Values, n: int) -> float:
        return 0.5 if task == FEW else 1.5

    reported: list[Trial] = []
    worker = FakeWorker(times, {"product_few": 1e-3, "product_many": 10e-3})
    search(database, [FEW, MANY], 2, report=reported.append).run([worker])
    assert [(t.task, t.best) for t in reported] == [(FEW, 0.5), (MANY, 1.0)]
    # 10 calls of 1 ms, which take half now, and 3 calls of 10 ms
    assert [t.total for t in reported] == pytest.approx([0.5, (5 + 30) / 40])
    assert [t.record for t in reported] == list(database.read(TARGET).records)


def test_sizes_weigh_by_their_calls(database: Database) -> None:
    """One size gets slower, the other faster; what counts is the workload's time in both."""
    task = product(buckets=(Bucket(1, 0, 99.0), Bucket(2, 0, 1.0)))

    class Both(FakeWorker):
        def measure(self, task: Task, values: Values, rounds: int) -> Any:
            found = super().measure(task, values, rounds)
            found.seconds[0] = [t * 0.9 for t in found.seconds[0]]
            found.seconds[1] = [t * 3 for t in found.seconds[1]]
            return found

    (found,) = search(database, [task], 1).run([Both(even)])
    assert found.best == pytest.approx((99 * 0.9 + 3) / 100)


def test_a_run_goes_on_where_the_last_one_ended(database: Database) -> None:
    """Failures are not tried again, either."""

    def times(task: Task, values: Values, n: int) -> float | Failure:
        if values.get("ahead") == 8:
            return Failure("timeout", "slow")
        return 0.7 if values == {"accumulators": 24} else 1.0

    first, second, third = (FakeWorker(times) for _ in range(3))
    search(database, [FEW], 9).run([first])
    (found,) = search(database, [FEW], 1000).run([second])
    assert (found.values, found.trials) == ({"accumulators": 24}, 19)
    asked = {frozen(values) for _, values, _ in first.asked}
    assert asked.isdisjoint(frozen(values) for _, values, _ in second.asked)
    (found,) = search(database, [FEW], 1000).run([third])
    assert third.asked == []
    assert found == Tuned(FEW, pytest.approx(10e-3), pytest.approx(0.7), {"accumulators": 24}, 19)


def test_records_of_other_sizes_are_not_taken_for_these(database: Database) -> None:
    other = product(buckets=(Bucket(1, 0, 1.0),))
    database.append(record(other))
    (found,) = search(database, [FEW], 1).run([FakeWorker(even)])
    assert (found.values, found.trials) == ({}, 1)


@pytest.mark.parametrize("outcome", ["failed", "timeout", "wrong"])
def test_failures_are_recorded_with_their_reason(database: Database, outcome: Any) -> None:
    (found,) = search(database, [FEW], 3).run([FakeWorker(lambda *_: Failure(outcome, "why"))])
    assert (found.default, found.best, found.values) == (None, 1.0, {})
    records = database.read(TARGET).records
    assert [(r.outcome, r.detail, r.default) for r in records] == [(outcome, "why", ())] * 3


def test_an_error_reaches_the_caller_and_records_are_kept(database: Database) -> None:
    def times(task: Task, values: Values, n: int) -> float:
        if len(worker.asked) == 3:
            raise InputError("no process")
        return 1.0

    worker, other = FakeWorker(times), FakeWorker(even)
    with pytest.raises(InputError, match="no process"):
        search(database, [FEW], 10).run([worker])
    assert len(database.read(TARGET).records) == 2
    assert worker.closed == 1
    worker.asked.clear()
    with pytest.raises(InputError, match="no process"):
        search(database, [MANY], 10**6).run([worker, other])
    assert other.closed == 1


def test_a_full_disk_ends_the_run(database: Database) -> None:
    reported: list[Trial] = []

    def report(trial: Trial) -> None:
        reported.append(trial)
        if len(reported) == 2:
            database.path.rename(database.path.with_suffix(".kept"))
            database.path.symlink_to("/dev/full")

    with pytest.raises(InputError, match="No space left"):
        search(database, [FEW], 10, report=report).run([FakeWorker(even)])
    assert len(reported) == 2
    assert len(database.path.with_suffix(".kept").read_text().splitlines()) == 2


def test_an_interrupt_closes_the_workers(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()

    def times(task: Task, values: Values, n: int) -> float:
        begun.set()
        go.wait(30)
        return 1.0

    class Interrupted(FakeWorker):
        def close(self) -> None:
            super().close()
            go.set()

    def report(trial: Trial) -> None:
        raise AssertionError("nothing was measured")

    worker, run = Interrupted(times), search(database, [FEW], 10, report=report)
    joined = threading.Thread.join

    def join(self: threading.Thread, timeout: float | None = None) -> None:
        if begun.wait(30):
            raise KeyboardInterrupt
        joined(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        run.run([worker])
    monkeypatch.undo()
    assert worker.closed == 1
    time.sleep(0.05)
    assert database.read(TARGET).records == ()


def test_workers_do_not_measure_the_same_candidate(database: Database) -> None:
    barrier = threading.Barrier(4, timeout=30)

    def times(task: Task, values: Values, n: int) -> float:
        barrier.wait()
        return 1.0

    workers = [FakeWorker(times) for _ in range(4)]
    search(database, [FEW, MANY], 40).run(workers)
    asked = [(task.key, frozen(values)) for worker in workers for task, values, _ in worker.asked]
    assert len(asked) == len(set(asked)) == 40
    assert [len(worker.asked) for worker in workers] == [10] * 4
    records = database.read(TARGET).records
    assert {(r.task, frozen(r.knobs)) for r in records} == set(asked)


def test_tiles_are_free_where_one_attention_alone_has_tiles() -> None:
    assert len(CPU.space(TASKS["prefill"], True)["tile"]) > 1


def test_the_same_seed_gives_the_same_candidates(tmp_path: Path) -> None:
    asked = []
    for name in ("a", "b", "c"):
        database, worker = Database(tmp_path / name), FakeWorker(even)
        database.create()
        search(database, [MANY], 40, seed=name == "c").run([worker])
        asked.append([values for _, values, _ in worker.asked])
    assert asked[0] == asked[1] != asked[2]
