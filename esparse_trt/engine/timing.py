"""Honest timing on the GPU: what a GEMM takes in a model that is running, not in a loop over a warm cache.

- Launches are captured in CUDA graphs of about a millisecond, so that no launch gap of the host is counted.
- Weights are rotated over copies that together are `ROTATION` times the L2 cache, so that each launch reads
  its weights from memory, as in a model.
- Contestants are interleaved, a replay of each in turn, and the device never idles in between: they see the
  same clocks, and the clocks are those of sustained load. Under a power limit a kernel is slower behind one
  that draws more power, so the order changes from round to round.
- The figure is the median over the replays, with the 10th and 90th percentile as its spread.

The caller's data should be random: zeros draw less power and run faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Protocol, TypeVar

import torch

ROTATION = 4  # copies of the weights, in multiples of the L2 cache
GRAPH_US = 1000.0  # what one graph should take at least


Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Microseconds per launch: median, 10th and 90th percentile over the replays."""

    us: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Replay:
    """Launches that are timed as one.

    Attributes:
        launch: enqueues all of them.
        launches: how many they are.
        prepare: runs before each replay, outside of the time.
        holds: what has to stay alive as long as the launches.
    """

    launch: Callable[[], None]
    launches: int
    prepare: Callable[[], None] | None = None
    holds: object = None


class Clock(Protocol):
    """Points in the device's time."""

    def mark(self) -> Any:
        """Enqueue a point."""

    def elapsed_us(self, first: Any, last: Any) -> float:
        """Time between two points, waiting for the second."""


class CudaClock:
    """CUDA events on torch's current stream."""

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Time between two events."""
        last.synchronize()
        return 1000.0 * first.elapsed_time(last)


# --- how much to launch ----------------------------------------------------------------------------------


def copies(bytes_each: int, l2_bytes: int) -> int:
    """How many copies of the weights to rotate over, so that none is in the cache when it is read again."""
    return max(1, math.ceil(ROTATION * l2_bytes / bytes_each))


def launches(copies: int, expected_us: float, graph_us: float = GRAPH_US) -> int:
    """Launches per graph: about `graph_us` of work; from one turn over the copies on, whole turns."""
    wanted = max(1, math.ceil(graph_us / expected_us))
    return wanted if wanted < copies else math.ceil(wanted / copies) * copies


def l2_bytes() -> int:
    """Size of the current GPU's L2 cache."""
    return torch.cuda.get_device_properties().L2_cache_size


# --- capture and measure -----------------------------------------------------------------------------------


@cache
def stream() -> torch.cuda.Stream:
    """The stream on which everything is captured and timed; the default stream cannot be captured."""
    return torch.cuda.Stream()


def capture(
    enqueue: Callable[[int], None], launches: int, prepare: Callable[[], None] | None = None
) -> Replay:
    """A CUDA graph of `enqueue(0), enqueue(1), ...`, to be used under `torch.cuda.stream(stream())`.

    The first is launched once before, outside of the graph: kernels are loaded when they are first used, and
    an error then names the launch instead of the capture.
    """
    graph = torch.cuda.CUDAGraph()
    if prepare is not None:
        prepare()
    enqueue(0)
    torch.cuda.current_stream().synchronize()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for index in range(launches):
            enqueue(index)
    finally:
        graph.capture_end()
    return Replay(graph.replay, launches, prepare, holds=enqueue)


def measure(
    contestants: Mapping[Name, Replay],
    *,
    budget_us: float,
    warm_us: float = 0.0,
    rounds: tuple[int, int] = (5, 50),
    clock: Clock | None = None,
) -> dict[Name, Timing]:
    """Time the contestants against each other.

    One round, which is not counted, tells how long a round is; rounds then follow without a pause.

    Args:
        contestants: by name; a replay of each makes a round.
        budget_us: device time to spend on counted rounds.
        warm_us: device time of rounds before them, which bring the clocks to those of sustained load.
        rounds: least and most counted rounds, whatever the budget.
        clock: for tests.
    """
    clock, random = clock or CudaClock(), Random(0)
    start = clock.mark()
    _round(contestants, clock, random)
    round_us = max(clock.elapsed_us(start, clock.mark()), 1e-3)
    for _ in range(math.ceil(warm_us / round_us)):
        _round(contestants, clock, random)
    count = min(max(int(budget_us / round_us), rounds[0]), rounds[1])
    marks = [_round(contestants, clock, random) for _ in range(count)]
    timings = {}
    for name, replay in contestants.items():
        times = sorted(clock.elapsed_us(*mark[name]) / replay.launches for mark in marks)
        timings[name] = Timing(*(percentile(times, share) for share in (0.5, 0.1, 0.9)))
    return timings


def _round(contestants: Mapping[Name, Replay], clock: Clock, random: Random) -> dict[Name, tuple[Any, Any]]:
    """A replay of each, in a random order; when it began and ended."""
    marks = {}
    for name, replay in random.sample(list(contestants.items()), len(contestants)):
        if replay.prepare is not None:
            replay.prepare()
        before = clock.mark()
        replay.launch()
        marks[name] = (before, clock.mark())
    return marks


def percentile(ascending: list[float], share: float) -> float:
    """The value at a share, 0 to 1, of a sorted list, between neighbours by their distance."""
    place = share * (len(ascending) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])
