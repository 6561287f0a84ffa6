"""Writes a server's counters in the text format of Prometheus."""

from collections.abc import Iterator
from typing import Any

_HELP = {
    "onionskin_uptime_seconds": ("gauge", "Since the server started."),
    "onionskin_memory_bytes": ("gauge", "Memory of the volume's index."),
    "onionskin_poisoned": ("gauge", "1 after a failed sync: the volume has to be opened again."),
    "onionskin_connections": ("gauge", "Clients that are connected."),
    "onionskin_export_connections": ("gauge", "Clients that have the export open."),
}
_Sample = tuple[str, dict[str, str], Any]  # metric, labels, value


def prometheus(stats: dict[str, Any]) -> str:
    """Write the result of `stats` as metrics, one a line, labelled with the volume and, if it has one, the export."""
    lines = []
    by_metric: dict[str, list[tuple[dict[str, str], Any]]] = {}
    for metric, labels, value in _samples(stats):
        by_metric.setdefault(metric, []).append((labels, value))
    for metric, found in by_metric.items():
        kind, text = _HELP.get(metric, ("counter", _about(metric)))
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"]
        for labels, value in found:
            lines.append(f"{metric}{{{','.join(_label(*label) for label in labels.items())}}} {value}")
    return "\n".join(lines) + "\n"


def _samples(stats: dict[str, Any]) -> Iterator[_Sample]:
    volume = {"volume": str(stats["volume"])}
    yield "onionskin_uptime_seconds", volume, stats["uptime_seconds"]
    yield "onionskin_memory_bytes", volume, stats["memory_bytes"]
    yield "onionskin_poisoned", volume, int(stats["poisoned"])
    yield "onionskin_connections", volume, len(stats["connections"])
    yield from _counted("onionskin_nbd", volume, stats["counters"])
    for one in stats["exports"]:
        labels = {**volume, "export": str(one["export"])}
        yield "onionskin_export_connections", labels, one["connections"]
        counted = {name: value for name, value in one.items() if name not in ("export", "connections")}
        yield from _counted("onionskin_export", labels, counted)


def _counted(prefix: str, labels: dict[str, str], counters: dict[str, Any]) -> Iterator[_Sample]:
    for name, value in counters.items():
        metric = f"{prefix}_{name}_total"
        if isinstance(value, dict):
            for command, count in value.items():
                yield metric, {**labels, "command": command}, count
        else:
            yield metric, labels, value


def _about(metric: str) -> str:
    whose = "the export since it was opened" if metric.startswith("onionskin_export") else "the server since it started"
    return f"Of all clients of {whose}."


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{escaped}"'
