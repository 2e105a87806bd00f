"""Threads that read experts: what a layer waits for goes before what may be needed later."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future as Task
from queue import PriorityQueue
from typing import NamedTuple

from ..errors import WorkError

NOW, EARLY, STOP = 0, 1, 2


class Job(NamedTuple):
    """A task in the queue; the first by urgency, and then by the time of asking, is done first."""

    urgency: int
    number: int
    task: Task[int]


class Readers:
    """A few threads and their queue. Daemons: a process that ends does not wait for them.

    Args:
        count: of threads.
        changed: who waits for it hears of each task that has ended.
    """

    def __init__(self, count: int, changed: threading.Condition) -> None:
        self._changed = changed
        self._queue: PriorityQueue[Job] = PriorityQueue()
        self._numbers = itertools.count()
        self._work: dict[Task[int], Callable[[], int]] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{n}", daemon=True) for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], int], *, early: bool = False) -> Task[int]:
        """Have something done by a thread.

        Args:
            work: returns the bytes that it read.
            early: whether nobody waits for it yet.

        Raises:
            WorkError: no thread is there to do it.
        """
        if self._closed or not any(thread.is_alive() for thread in self._threads):
            raise WorkError("the threads that read experts are gone; load the model again")
        task: Task[int] = Task()
        self._work[task] = work
        self._queue.put(Job(EARLY if early else NOW, next(self._numbers), task))
        return task

    def hurry(self, task: Task[int]) -> None:
        """Note that somebody waits for a task now."""
        if task in self._work:  # it stands in the queue twice then, and is done once
            self._queue.put(Job(NOW, next(self._numbers), task))

    def _run(self) -> None:
        while self._do(self._queue.get()):
            pass

    def _do(self, job: Job) -> bool:
        """Do what was asked for, unless it was given up or done; says no when it is time to stop.

        A method of its own, so that a thread that waits holds nothing of what it did last.
        """
        work = self._work.pop(job.task, None)
        if work is not None and job.task.set_running_or_notify_cancel():
            try:
                job.task.set_result(work())
            except BaseException as error:
                job.task.set_exception(error)
            with self._changed:
                self._changed.notify_all()
        return job.urgency != STOP

    def close(self) -> None:
        """Stop the threads after what they are at; what they had not begun fails."""
        self._closed = True
        for task in list(self._work):
            task.cancel()
        for _ in self._threads:
            self._queue.put(Job(STOP, next(self._numbers), Task()))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
