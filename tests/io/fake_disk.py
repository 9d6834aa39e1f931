"""A disk with scripted rates, on a clock of its own."""

import random

from penstock.io.window import Window


class FakeDisk:
    """`rate(cell)` in bytes/s; visits scatter by ±`noise`, and the whole disk drifts by `drift` a second."""

    def __init__(self, rate, *, noise=0.0, drift=0.0, seed=1):
        self.now = 0.0
        self.visits = []
        self._rate, self._noise, self._drift = rate, noise, drift
        self._rng = random.Random(seed)

    def clock(self):
        return self.now

    def measure(self, cell, seconds):
        rate = self._rate(cell) * (1 + self._noise * self._rng.uniform(-1, 1)) * (1 + self._drift) ** self.now
        self.visits.append(cell)
        self.now += seconds + 0.05
        return window(rate * seconds, seconds)


def window(nbytes, seconds=1.0, **changes):
    values = {
        "nbytes": int(nbytes), "seconds": seconds, "requests": 10, "cpu_seconds": 0.01, "latency_p50": 1e-3,
        "latency_p99": 2e-3, "latency_max": 3e-3, "short_reads": 0, "errors": 0,
    }  # fmt: skip
    return Window(**(values | changes))
