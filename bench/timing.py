"""GPU time of calls, from replays of a CUDA graph: no launch cost, no host."""

import statistics
from collections.abc import Callable
from typing import Any

import torch


def microseconds(calls: list[Callable[[], Any]], rounds: int = 4, replays: int = 15) -> float:
    """Median GPU time of one of ``calls``, which a graph runs one after the other, ``rounds`` times over."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / (rounds * len(calls)))
    return statistics.median(times[3:])
