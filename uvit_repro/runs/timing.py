"""The timer of the house: calls, contestants in turn, a machine's ceiling."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    "Median, quartiles and extremes of repeated measurements."

    median: float
    low: float  # lower quartile
    high: float  # upper quartile
    min: float
    max: float
    n: int  # how many


def spread(
    values,  # numbers, at least one
) -> Spread:
    "Summarise repeated measurements. Raises `ValueError` when there are none."
    v = np.asarray(values, dtype=float)
    if not v.size:
        raise ValueError("no measurements: repeats must be at least 1")
    low, median, high = (float(q) for q in np.quantile(v, (0.25, 0.5, 0.75)))
    return Spread(median, low, high, float(v.min()), float(v.max()), v.size)


def paired_ratio(
    slow,  # seconds of one contestant
    fast,  # seconds of another, taken in turn with the first
) -> Spread:  # above 1: the second is faster
    "The ratios of neighbouring times: drift of the machine cancels."
    return spread(np.asarray(slow) / np.asarray(fast))


def time_calls(
    fn: Callable,  # called without arguments
    device="cpu",  # where it computes
    repeats: int = 5,  # timed calls
    warmup: int = 2,  # untimed calls before them
) -> list:  # seconds of each timed call
    "Time calls by device events on a GPU, by the clock on a CPU, without waiting between them."
    device = torch.device(device)
    for _ in range(warmup):
        fn()
    if device.type != "cuda":
        ticks = [time.perf_counter()]
        for _ in range(repeats):
            fn()
            ticks.append(time.perf_counter())
        return np.diff(ticks).tolist()
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize(device)
        events[0].record()
        for event in events[1:]:
            fn()
            event.record()
        torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]


def interleaved(
    calls: dict,  # name -> function without arguments, already warmed up
    repeats: int = 10,  # timed repetitions of each
    device="cpu",  # where they compute
    min_seconds: float = 0.05,  # a repetition holds as many calls as fill this; 0: one call
    stop: Callable = bool,  # () -> bool, asked before each round: whether to end now
) -> Iterator[dict]:  # after each round: name -> seconds per call, one for each repetition so far
    "Time functions in turn, so that drift of the machine hits all alike."
    per_repetition = dict.fromkeys(calls, 1)
    if min_seconds and not stop():
        for name, call in calls.items():
            once = max(sum(time_calls(call, device, 1, 0)), 1e-9)
            per_repetition[name] = min(max(1, math.ceil(min_seconds / once)), 10_000)
    times = {name: [] for name in calls}
    for _ in range(repeats):
        if stop():
            return
        for name, call in calls.items():
            n = per_repetition[name]
            times[name].append(sum(time_calls(call, device, n, 0)) / n)
        yield times


def matmul_rate(
    device="cpu",
    dtype=torch.float32,
    sizes=None,  # sides of square matrices; None: 512 and 1024 on a CPU, 4096 and 8192 on a GPU
    repeats: int = 5,  # timed products of each size
) -> float:  # FLOP/s
    "The rate of matrix products: the best of the sizes' medians."
    device = torch.device(device)
    rates = []
    for n in sizes or ((4096, 8192) if device.type == "cuda" else (512, 1024)):
        a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        seconds = time_calls(partial(torch.mm, a, b, out=out), device, repeats)
        rates.append(2 * n**3 / statistics.median(seconds))
    return max(rates)
