"""Draws the results: a chart as SVG, and a page of HTML that needs nothing else. Both follow a light or dark scheme.

The chart has one row for each way of doing something, a dot at the median and a line between the quartiles, over one
logarithmic axis of time: the ways differ by factors of a thousand, and a dot says no more than its place does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from onionskin.measure.headline import ENGINE, Comparison
from onionskin.measure.timing import Samples, duration, ratio
from onionskin.pictures.svg import with_plain_colours

WIDTH, LABELS, RIGHT = 760, 264, 146
ROW, GROUP_GAP, GROUP_TITLE, TOP, BOTTOM = 20, 12, 20, 24, 30

_LIGHT = "--ink:#1c1e21;--soft:#656b73;--line:#e2e4e8;--engine:#b3456b;--peer:#6b7683;--paper:#ffffff"
_COLOURS = (
    f".onion{{{_LIGHT}}}"
    + """
@media (prefers-color-scheme:dark){.onion{--ink:#e6e8eb;--soft:#9aa1aa;--line:#33383f;--engine:#f08fb0;--peer:#a3acb8;
--paper:#16181b}}
"""
)
_CHART_STYLE = """
.onion text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink)}
.onion .title{font-weight:600;paint-order:stroke;stroke:var(--paper);stroke-width:5px}
.onion .soft{fill:var(--soft)}.onion .engine{fill:var(--engine);font-weight:600}
.onion .grid{stroke:var(--line)}.onion .paper{fill:var(--paper)}
.onion .dot{fill:var(--peer)}.onion .spread{stroke:var(--peer);stroke-width:2;stroke-linecap:round}
.onion .dot.engine{fill:var(--engine)}.onion .spread.engine{stroke:var(--engine)}
"""
_PAGE_STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;max-width:800px;margin:2rem auto;padding:0 1rem;
background:var(--paper);color:var(--ink)}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}p,dl,li{color:var(--soft)}svg{max-width:100%;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .6rem .3rem 0;border-bottom:1px solid var(--line)}
td.number,th.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
tr.engine td{color:var(--engine);font-weight:600}tr.group td{padding-top:1rem;font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}dd{margin:0}
"""


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis of seconds, in whole decades."""

    low: int
    high: int

    @classmethod
    def over(cls, seconds: Sequence[float]) -> "Axis":
        """Return the decades that hold all of these."""
        low = math.floor(math.log10(min(seconds)))
        return cls(low, max(low + 1, math.ceil(math.log10(max(seconds)))))

    def place(self, seconds: float) -> float:
        """Return where on the chart a time is, in pixels from its left."""
        part = (math.log10(seconds) - self.low) / (self.high - self.low)
        return LABELS + part * (WIDTH - LABELS - RIGHT)


def draw_chart(comparisons: Sequence[Comparison]) -> str:
    """Return the chart as an SVG document that carries its own style."""
    axis = Axis.over([s for c in comparisons for samples in c.samples.values() for s in samples.seconds])
    parts, y = [_text(WIDTH - 4, TOP - 8, "times onionskin's", "soft", "end")], float(TOP)
    for comparison in comparisons:
        parts.append(_text(4, y + 14, comparison.title, "title"))
        y += GROUP_TITLE
        for member, samples in comparison.samples.items():
            parts.append(_row(axis, y, member, samples, _times(comparison, member)))
            y += ROW
        y += GROUP_GAP
    height = round(y + BOTTOM)
    style = f"<style>{_COLOURS}{with_plain_colours(_CHART_STYLE, _LIGHT)}</style>".replace("\n", "")
    alt = "<title>Time of each operation, on a logarithmic axis; shorter is better</title>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="onion" viewBox="0 0 {WIDTH} {height}" role="img">'
    paper = f'<rect class="paper" width="{WIDTH}" height="{height}"/>'
    return "\n".join([head, alt, style, paper, _grid(axis, y), *parts, "</svg>\n"])


def _times(comparison: Comparison, member: str) -> str:
    """How many times as long as the engine a peer takes."""
    if member == ENGINE or ENGINE not in comparison.samples:
        return ""
    return times(ratio(comparison.samples, member, ENGINE))


def times(factor: float) -> str:
    """Write a factor: three digits at most, and none that pretends."""
    return f"{factor:.2g} x" if factor < 10 else f"{float(f'{factor:.2g}'):,.0f} x"


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind} text-anchor="{anchor}">{escape(text)}</text>'


def _row(axis: Axis, y: float, member: str, samples: Samples, factor: str) -> str:
    engine = " engine" if member == ENGINE else ""
    middle = y + ROW / 2
    low, high = (axis.place(s) for s in samples.quartiles)
    at = axis.place(samples.median)
    return "".join(
        [
            _text(LABELS - 14, middle + 4, member, engine.strip(), "end"),
            f'<line class="spread{engine}" x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>',
            f'<circle class="dot{engine}" cx="{at:.1f}" cy="{middle:.1f}" r="4.5"/>',
            _text(WIDTH - 72, middle + 4, duration(samples.median), engine.strip(), "end"),
            _text(WIDTH - 4, middle + 4, factor, "soft", "end") if factor else "",
        ]
    )


def _grid(axis: Axis, bottom: float) -> str:
    lines = []
    for decade in range(axis.low, axis.high + 1):
        x = axis.place(10.0**decade)
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom:.1f}"/>')
        lines.append(_text(x, bottom + 16, duration(10.0**decade), "soft", "middle"))
    return "".join(lines)


def draw_page(comparisons: Sequence[Comparison], machine: dict[str, str], when: datetime) -> str:
    """Return the report as one HTML page."""
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in machine.items())
    skipped = "".join(
        f"<li>{escape(member)}: {escape(reason)}</li>" for c in comparisons for member, reason in c.skipped.items()
    )
    return f"""<!doctype html>
<html lang="en" class="onion">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>onionskin bench</title>
<style>{_COLOURS}{_PAGE_STYLE}</style>
<h1>onionskin, beside what one would use instead</h1>
<p>Time of one operation: the median (dot) and the quartiles (line), on a logarithmic axis; further left is better. The
last column says how many times as long as onionskin each way took. All took turns in one run; durable operations
include their sync.</p>
<div class="scroll">{draw_chart(comparisons)}</div>
<h2>Figures</h2>
<div class="scroll"><table>
<tr><th>what</th><th class="number">median</th><th class="number">quartiles</th><th class="number">rounds</th>
<th class="number">times onionskin's</th></tr>
{"".join(_group_rows(comparison) for comparison in comparisons)}
</table></div>
{f"<h2>Not measured</h2><ul>{skipped}</ul>" if skipped else ""}
<h2>Machine</h2>
<dl>{facts}<dt>date</dt><dd>{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC</dd></dl>
</html>
"""


def _group_rows(comparison: Comparison) -> str:
    rows = [f'<tr class="group"><td colspan="5">{escape(comparison.title)}</td></tr>']
    for member, samples in comparison.samples.items():
        low, high = samples.quartiles
        numbers = (
            duration(samples.median),
            f"{duration(low)} to {duration(high)}",
            str(len(samples.seconds)),
            _times(comparison, member) or "1",
        )
        cells = "".join(f'<td class="number">{escape(number)}</td>' for number in numbers)
        kind = ' class="engine"' if member == ENGINE else ""
        rows.append(f"<tr{kind}><td>{escape(member)}</td>{cells}</tr>")
    return "\n".join(rows)


def draw_table(comparisons: Sequence[Comparison]) -> str:
    """Return the results as a table in Markdown, as the README shows it."""
    lines = ["| what | way | median | times onionskin's |", "|---|---|---|---|"]
    for comparison in comparisons:
        title = comparison.title
        for member, samples in comparison.samples.items():
            factor = _times(comparison, member) or "1"
            lines.append(f"| {title} | {member} | {duration(samples.median)} | {factor} |")
            title = ""
    return "\n".join(lines)
