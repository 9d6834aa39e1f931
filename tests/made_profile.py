"""A hardware profile in which every field has a value, for tests of whoever reads one."""

from dataclasses import replace

from penstock.io.advice import Warn
from penstock.io.blockdev import BlockDevice, PcieLink
from penstock.io.cells import Cell, CellRates
from penstock.io.facts import DirectFacts, FileFacts, HostFacts, TargetFacts
from penstock.io.fio import FioCell, FioVerdict
from penstock.io.plateau import Choice
from penstock.io.profiler import DiskProfile
from penstock.io.sweep import Sweep
from penstock.offload.hardware import SCHEMA, UNKNOWN_LINKS, HardwareProfile

CELL = Cell("libaio", "window", 1 << 20, 32)


def make_disk(rate=6e9, device="259:1", noise=0.01):
    choice = Choice(CELL, rate, rate * 0.99, rate * 1.01, 0.99, CELL, rate / 0.99, "high", noise, "the plateau")
    rates = CellRates(CELL, (rate, rate * 1.01), rate, rate, rate * 1.01, 0.02, 1e-3, 2e-3, 3e-3, 0, 0)
    drive = BlockDevice(
        "nvme0n1", "FAST", PcieLink(16.0, 4, 32.0, 4), 0, "none", 1023, 524288, 127, False, None, None, ("sda", "sdb")
    )
    target = TargetFacts("/models", "xfs", "/", "rw", device, 100, 50, (drive,), DirectFacts(True, None, 4, 512))
    sweep = Sweep((rates,), ((rate, rate),), choice, CELL, 1e9, rate, None, rate, 4.0, True)
    verdict = FioVerdict(
        "fio-3.33", ("fio",), "2 MiB", (FioCell(CELL, 7, 1.0, 0.9, 1.1, 1e9, 1e9, 1.0, True),), "agrees"
    )
    file = FileFacts(True, 1 << 32, 1 << 32, 38, 0.0)
    return DiskProfile(target, file, "libaio", "it works", sweep, 1.01, verdict, (Warn("thp_never", "a", "b"),))


def make_profile(*disks, **links):
    host = HostFacts("6.18", "3.11", 16, 1, 1 << 37, 1 << 36, None, 8 << 20, 0, 65536, 0, "madvise", 0)
    links = replace(UNKNOWN_LINKS, **({"matmul": {"bfloat16": 7.9e14}, "complete": True} | links))
    return HardwareProfile(
        SCHEMA, "0.1.0", "2026-01-02T03:04:05+00:00", 71.2, True, host, disks or (make_disk(),), links, ()
    )
