"""Several runs at once, their atoms in one batch.

In: a calculator, and functions that each take a calculator and use it as they like, such as runs of
ASE's dynamics. Out: what they return. Each runs in a thread of its own and, wherever it asks for
forces, waits until all others ask too; then the model is called once, for all. A small molecule
leaves most of a GPU idle, and some of a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Condition
from typing import TypeVar

from ase import Atoms
from ase.calculators.calculator import Calculator

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.model import Result

Outcome = TypeVar("Outcome")


def side_by_side(
    calculator: AllScAIPCalculator,
    works: Sequence[Callable[[Calculator], Outcome]],
    tick: Callable[[int], None] = lambda runs: None,
) -> list[Outcome]:
    """Call all functions at once, each with a calculator of its own.

    A structure that the model has no answer for, such as atoms on one spot, is an error in its own
    run alone. An error that a run does not catch, and Ctrl-C, stop the others by a `CancelledError`
    where they next ask for forces, and are raised here.

    Args:
        calculator: whose model gives all answers.
        works: the functions.
        tick: called after each call of the model with the number of runs that it answered.

    Returns:
        What the functions returned, in order.
    """
    requests = _Requests(len(works))

    def go(number: int) -> Outcome:
        try:
            return works[number](_OneOfSeveral(calculator, requests, number))
        except BaseException:
            requests.failed = True
            raise
        finally:
            requests.leave(number)

    with ThreadPoolExecutor(max(1, len(works))) as pool:
        futures = [pool.submit(go, number) for number in range(len(works))]
        try:
            while batch := requests.next_batch():
                requests.answer(_answers(calculator, batch))
                tick(len(batch))
        finally:
            requests.stop()
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, CancelledError)):
        raise error
    return [future.result() for future in futures]


Answer = Result | Exception


def _answers(calculator: AllScAIPCalculator, batch: dict[int, Atoms]) -> dict[int, Answer]:
    try:
        results = calculator.model.predict(
            list(batch.values()), calculator.recorded, calculator.outside_training
        )
        return dict(zip(batch, results, strict=True))
    except ValueError as error:  # one of the structures has no answer: find out which
        if len(batch) == 1:
            return dict.fromkeys(batch, error)
        answers: dict[int, Answer] = {}
        for number, atoms in batch.items():
            answers |= _answers(calculator, {number: atoms})
        return answers


class _Requests:
    """Structures that the runs' threads wait for the answers of."""

    def __init__(self, runs: int) -> None:
        self.running = set(range(runs))
        self.waiting: dict[int, Atoms] = {}
        self.answers: dict[int, Answer] = {}
        self.failed = self.stopped = False
        self.changed = Condition()

    def wait_for_answer(self, number: int, atoms: Atoms) -> Result:
        """Of run `number`: hand in a structure and wait for the result."""
        with self.changed:
            self.waiting[number] = atoms
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.stopped or number in self.answers)
            if self.stopped:
                raise CancelledError("another run failed, or the user pressed Ctrl-C")
            answer = self.answers.pop(number)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def leave(self, number: int) -> None:
        """Of run `number`: it has ended."""
        with self.changed:
            self.running.discard(number)
            self.changed.notify_all()

    def next_batch(self) -> dict[int, Atoms]:
        """The structures of all runs, once each that has not ended waits; none if one failed."""
        with self.changed:
            self.changed.wait_for(lambda: self.failed or self.waiting.keys() == self.running)
            if self.failed:
                return {}
            batch = {number: self.waiting[number] for number in sorted(self.waiting)}
            self.waiting.clear()
        return batch

    def answer(self, answers: dict[int, Answer]) -> None:
        """Hand the answers to the runs, by their numbers."""
        with self.changed:
            self.answers |= answers
            self.changed.notify_all()

    def stop(self) -> None:
        """Raise `CancelledError` in every run that waits or will."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


class _OneOfSeveral(AllScAIPCalculator):
    """The calculator of one run, whose structures go to the model with those of the others."""

    def __init__(self, calculator: AllScAIPCalculator, requests: _Requests, number: int) -> None:
        Calculator.__init__(self)
        self.model, self.recorded = calculator.model, calculator.recorded
        self.outside_training = calculator.outside_training
        self.requests, self.number = requests, number

    def answer(self, atoms: Atoms) -> Result:
        """What the model gives, in one call with the structures of the other runs."""
        return self.requests.wait_for_answer(self.number, atoms)
