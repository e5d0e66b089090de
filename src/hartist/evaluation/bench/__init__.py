"""`hartist bench`: where the time and the memory of generation go, and how near the machine's limit that is."""

from hartist.evaluation.bench.hardware import machine
from hartist.evaluation.bench.run import BenchResult, BenchSettings, run_bench

__all__ = ["BenchResult", "BenchSettings", "machine", "run_bench"]
