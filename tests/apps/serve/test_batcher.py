"""The queue in front of the model: what is joined, what is refused, and what a failure spoils."""

import threading

import pytest

from apps.serve.batcher import Batcher, QueueFull


class Model:
    """Doubles numbers, in batches that it remembers, and waits when it is told to; it fails on 13."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.go.wait(60)
        self.batches.append(items)
        if 13 in items:
            raise ValueError("thirteen")
        return [2 * item for item in items]


def test_what_waits_is_run_together_up_to_the_limit():
    model = Model()
    batcher = Batcher(most_waiting=100, most_together=4)
    first = batcher.submit(model, [1], 1)
    while batcher.waiting:  # until the model has it
        pass
    others = [batcher.submit(model, items, len(items)) for items in ([2, 3], [4], [5, 6], [7, 8, 9, 10, 11])]
    assert batcher.waiting == 10
    model.go.set()
    assert [job.result() for job in (first, *others)] == [[2], [4, 6], [8], [10, 12], [14, 16, 18, 20, 22]]
    assert model.batches == [[1], [2, 3, 4], [5, 6], [7, 8, 9, 10, 11]]
    batcher.close()
    assert not batcher.alive and batcher.waiting == 0


def test_too_much_is_refused_and_closing_finishes_what_was_accepted():
    model = Model()
    batcher = Batcher(most_waiting=3, most_together=4)
    jobs = [batcher.submit(model, [1], 1)]
    while batcher.waiting:
        pass
    jobs += [batcher.submit(model, [2], 2), batcher.submit(model, [3], 1)]
    with pytest.raises(QueueFull):
        batcher.submit(model, [4], 1)
    threading.Timer(0.05, model.go.set).start()
    batcher.close()
    assert [job.result(0) for job in jobs] == [[2], [4], [6]]
    with pytest.raises(QueueFull):
        batcher.submit(model, [5], 1)


def test_a_job_that_fails_spoils_no_other_and_one_that_was_given_up_is_left_out():
    model, other = Model(), Model()
    batcher = Batcher(most_waiting=100, most_together=100)
    first = batcher.submit(model, [0], 1)
    while batcher.waiting:
        pass
    good, bad, given_up = (batcher.submit(model, [item], 1) for item in (1, 13, 2))
    apart = batcher.submit(other, [3], 1)  # of another function: never joined
    given_up.cancel()
    model.go.set(), other.go.set()
    assert first.result() == [0] and good.result() == [2] and apart.result() == [6]
    with pytest.raises(ValueError, match="thirteen"):
        bad.result()
    assert model.batches == [[0], [1, 13], [1], [13]] and other.batches == [[3]]
    batcher.close()
