"""The results as JSON that ``pytest-benchmark compare`` reads, and the machine that they are from."""

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onionskin import __version__
from onionskin.measure.headline import Comparison
from onionskin.measure.timing import Samples


def describe_machine(directory: Path) -> dict[str, str]:
    """Return what the figures depend on: processor, cores, memory, kernel, file system, Python."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "file system": file_system_of(directory),
        "python": platform.python_version(),
        "onionskin": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def file_system_of(directory: Path) -> str:
    """Return the kind of file system that a directory is on."""
    best, kind = "", "unknown"
    where = str(directory.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        point, name = line.split()[1:3]
        inside = where == point or where.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


def as_benchmarks(comparisons: Sequence[Comparison], machine: dict[str, str], when: datetime) -> dict[str, Any]:
    """Return the document that pytest-benchmark would have written for these results."""
    return {
        "machine_info": {"node": platform.node(), "cpu": {"brand_raw": machine["processor"]}, **machine},
        "commit_info": {},
        "benchmarks": [
            _benchmark(comparison, member, samples)
            for comparison in comparisons
            for member, samples in comparison.samples.items()
        ],
        "datetime": when.astimezone(UTC).isoformat(),
        "version": "5.0.0",
    }


def _benchmark(comparison: Comparison, member: str, samples: Samples) -> dict[str, Any]:
    name = f"{comparison.group}: {member}"
    return {
        "group": comparison.group,
        "name": name,
        "fullname": f"onionskin bench::{name}",
        "params": None,
        "param": None,
        "extra_info": {"title": comparison.title, **comparison.extra_info},
        "options": {"disable_gc": False, "timer": "perf_counter", "warmup": True},
        "stats": _stats(samples),
    }


def _stats(samples: Samples) -> dict[str, Any]:
    seconds = samples.seconds
    low, high = samples.quartiles
    mean = statistics.fmean(seconds)
    return {
        "min": min(seconds),
        "max": max(seconds),
        "mean": mean,
        "stddev": statistics.stdev(seconds) if len(seconds) > 1 else 0.0,
        "rounds": len(seconds),
        "median": samples.median,
        "iqr": high - low,
        "q1": low,
        "q3": high,
        "iqr_outliers": 0,
        "stddev_outliers": 0,
        "outliers": "0;0",
        "ld15iqr": min(seconds),
        "hd15iqr": max(seconds),
        "ops": 1 / mean,
        "total": sum(seconds),
        "data": seconds,
        "iterations": 1,
    }
