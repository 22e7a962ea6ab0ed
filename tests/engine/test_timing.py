"""The timing harness on a clock that only goes on when something is launched."""

import math

import pytest

from esparse_trt.engine import timing
from esparse_trt.engine.timing import Replay, copies, launches, measure, percentile


class Device:
    """Stands for the GPU and for its clock: `launch` takes as long as it is told."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def replay(self, name, times, launches=1, prepare_us=0.0):
        times = iter(times)

        def launch():
            self.log.append(name)
            self.now += next(times)

        def prepare():
            self.now += prepare_us

        return Replay(launch, launches, prepare)

    def mark(self):
        return self.now

    def elapsed_us(self, first, last):
        return last - first


def forever(us):
    while True:
        yield us


def test_contestants_take_turns_and_a_first_round_is_not_counted():
    device = Device()
    a = device.replay("a", [1000.0, *[30.0] * 5], launches=10)
    b = device.replay("b", [1000.0, 20.0, 21.0, 22.0, 23.0, 24.0], launches=2)
    times = measure({"a": a, "b": b}, budget_us=1.0, rounds=(5, 50), clock=device)
    turns = [device.log[i : i + 2] for i in range(0, 12, 2)]
    assert all(sorted(turn) == ["a", "b"] for turn in turns)
    assert ["a", "b"] in turns and ["b", "a"] in turns
    assert times["a"] == timing.Timing(3.0, 3.0, 3.0)
    assert times["b"].us == 11.0
    assert (times["b"].p10, times["b"].p90) == pytest.approx((10.2, 11.8))


def test_what_prepares_a_replay_is_not_counted():
    device = Device()
    replay = device.replay("a", forever(10.0), prepare_us=500.0)
    assert measure({"a": replay}, budget_us=1.0, clock=device)["a"].us == 10.0


@pytest.mark.parametrize(
    ("budget", "rounds"), [(1.0, 5), (1000.0, 10), (1e9, 50)], ids=["least", "by budget", "most"]
)
def test_the_budget_decides_on_the_number_of_rounds(budget, rounds):
    device = Device()
    measure({"a": device.replay("a", forever(100.0))}, budget_us=budget, clock=device)
    assert len(device.log) == 1 + rounds


def test_warm_rounds_come_before_the_counted_ones():
    device = Device()
    slow_then_sustained = iter([*[50.0] * 11, *[78.0] * 5])
    replay = device.replay("a", slow_then_sustained)
    times = measure({"a": replay}, budget_us=1.0, warm_us=500.0, clock=device)
    assert times["a"].us == 78.0


def test_the_copies_are_several_times_the_cache():
    cache = 50 << 20
    for size in (1000, 903_168, 18_874_368, 528 << 20):
        assert copies(size, cache) * size >= timing.ROTATION * cache
    assert copies(528 << 20, cache) == 1


def test_graphs_are_whole_turns_over_the_copies_or_a_part_of_one():
    assert launches(copies=11, expected_us=6.3, graph_us=1000.0) == 165
    assert launches(copies=222, expected_us=2.0, graph_us=300.0) == 150
    assert launches(copies=1, expected_us=5000.0, graph_us=1000.0) == 1


def test_percentiles_lie_between_neighbours():
    assert percentile([5.0], 0.9) == 5.0
    assert percentile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert math.isclose(percentile([1.0, 2.0, 4.0], 0.75), 3.0)
