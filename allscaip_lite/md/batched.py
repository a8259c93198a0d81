"""Several runs side by side, their atoms in one batch.

In: a calculator, and functions that each take a calculator and use it as they like, such as runs of
ASE's dynamics. Out: what they return. Each goes in a thread of its own and waits, wherever it asks
for forces, until all others ask too; then the model is called once, for all. A small molecule
leaves most of a GPU idle, and some of a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import TypeVar

from ase import Atoms
from ase.calculators.calculator import Calculator

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.model import Result

Outcome = TypeVar("Outcome")


class Stopped(RuntimeError):
    """A run whose neighbour failed, or whose user has had enough."""


def side_by_side(
    calculator: AllScAIPCalculator,
    works: Sequence[Callable[[Calculator], Outcome]],
    tick: Callable[[int], None] = lambda runs: None,
) -> list[Outcome]:
    """What each of `works` returns of a calculator of its own, in order.

    All answers are those of `calculator`'s model. What one run asks in vain, such as the forces of
    atoms on one spot, is an error in that run alone. One that it does not catch is raised here, as
    Ctrl-C is, after the others were stopped where they next asked. `tick` is called after each call
    of the model, with the number of runs it answered.
    """
    table = _Table(len(works))

    def go(number: int) -> Outcome:
        try:
            return works[number](_Seat(calculator, table, number))
        except BaseException:
            table.failed = True
            raise
        finally:
            table.leave(number)

    with ThreadPoolExecutor(max(1, len(works))) as pool:
        futures = [pool.submit(go, number) for number in range(len(works))]
        try:
            while batch := table.next_batch():
                table.give(_answers(calculator, batch))
                tick(len(batch))
        finally:
            table.stop()
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [future.result() for future in futures]


Answer = Result | Exception


def _answers(calculator: AllScAIPCalculator, batch: dict[int, Atoms]) -> dict[int, Answer]:
    try:
        results = calculator.model.predict(list(batch.values()), calculator.recorded)
        return dict(zip(batch, results, strict=True))
    except ValueError as error:  # a structure without an answer: whose?
        if len(batch) == 1:
            return dict.fromkeys(batch, error)
        answers: dict[int, Answer] = {}
        for number, atoms in batch.items():
            answers |= _answers(calculator, {number: atoms})
        return answers


class _Table:
    """Where the runs meet: each lays down its question, and takes up its answer."""

    def __init__(self, seats: int) -> None:
        self.seated = set(range(seats))
        self.asked: dict[int, Atoms] = {}
        self.answers: dict[int, Answer] = {}
        self.failed = self.stopped = False
        self.changed = Condition()

    def ask(self, number: int, atoms: Atoms) -> Result:
        with self.changed:
            self.asked[number] = atoms
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.stopped or number in self.answers)
            if self.stopped:
                raise Stopped("stopped, for another run was")
            answer = self.answers.pop(number)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def leave(self, number: int) -> None:
        with self.changed:
            self.seated.discard(number)
            self.changed.notify_all()

    def next_batch(self) -> dict[int, Atoms]:
        """The questions of all who are still there, once all have asked; nothing when all left, or
        one failed."""
        with self.changed:
            self.changed.wait_for(lambda: self.failed or self.asked.keys() == self.seated)
            if self.failed:
                return {}
            batch = {number: self.asked[number] for number in sorted(self.asked)}
            self.asked.clear()
        return batch

    def give(self, answers: dict[int, Answer]) -> None:
        with self.changed:
            self.answers |= answers
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


class _Seat(AllScAIPCalculator):
    """A calculator that asks at the table."""

    def __init__(self, calculator: AllScAIPCalculator, table: _Table, number: int) -> None:
        Calculator.__init__(self)
        self.model, self.recorded = calculator.model, calculator.recorded
        self.table, self.number = table, number

    def answer(self, atoms: Atoms) -> Result:
        return self.table.ask(self.number, atoms)
