"""A server's counters in the text form of Prometheus."""

from typing import Any

_HELP = {
    "onionskin_uptime_seconds": ("gauge", "Since the server started."),
    "onionskin_memory_bytes": ("gauge", "Memory of the volume's index."),
    "onionskin_poisoned": ("gauge", "1 after a failed sync: the volume has to be opened again."),
    "onionskin_connections": ("gauge", "Clients that are connected."),
}


def prometheus(stats: dict[str, Any]) -> str:
    """Write what `stats` gives as metrics, one line each, with the volume as a label."""
    label = _label("volume", str(stats["volume"]))
    values: dict[str, list[tuple[str, Any]]] = {
        "onionskin_uptime_seconds": [(label, stats["uptime_seconds"])],
        "onionskin_memory_bytes": [(label, stats["memory_bytes"])],
        "onionskin_poisoned": [(label, int(stats["poisoned"]))],
        "onionskin_connections": [(label, len(stats["connections"]))],
    }
    for name, value in stats["counters"].items():
        metric = f"onionskin_nbd_{name}_total"
        if isinstance(value, dict):
            values[metric] = [(f"{label},{_label('command', command)}", count) for command, count in value.items()]
        else:
            values[metric] = [(label, value)]
    lines = []
    for metric, samples in values.items():
        kind, text = _HELP.get(metric, ("counter", "Of all clients since the server started."))
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"]
        lines += [f"{metric}{{{labels}}} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{escaped}"'
