"""The common parts of SVG pictures: a self-contained document, escaped text, colours for both schemes."""

import re
from collections.abc import Sequence

FONT = 'system-ui,-apple-system,"Segoe UI",sans-serif'
_SCHEMES = (
    "--ink:#1c1e21;--soft:#656b73;--line:#e2e4e8;--paper:#ffffff;--base:#8b95a1",
    "--ink:#e6e8eb;--soft:#9aa1aa;--line:#33383f;--paper:#16181b;--base:#747e8a",
)
_STYLE = (
    f".skin text{{font:12px {FONT};fill:var(--ink)}}.skin .title{{font-weight:600}}.skin .soft{{fill:var(--soft)}}"
    ".skin .end{text-anchor:end}.skin .paper{fill:var(--paper)}"
)
_VARIABLE = re.compile(r"([a-z-]+):var\((--[a-z]+)\)")
# Hot to cold, as the layers go from the head down; each differs from white and from black.
_RAMP = ((214, 57, 75), (232, 128, 48), (196, 160, 40), (78, 160, 104), (46, 140, 168), (72, 100, 190), (122, 84, 170))

RGB = tuple[int, int, int]


def document(width: float, height: float, title: str, style: str, body: Sequence[str]) -> str:
    """Return an SVG document; `style` may use --ink, --soft, --line, --paper and --base."""
    light, dark = _SCHEMES
    schemes = f".skin{{{light}}}@media(prefers-color-scheme:dark){{.skin{{{dark}}}}}"
    style = with_plain_colours(_STYLE + style, light)
    size = f"{_short(width)} {_short(height)}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="skin" viewBox="0 0 {size}" role="img">',
            f"<title>{clean(title)}</title>",
            f"<style>{schemes}{style}</style>",
            f'<rect class="paper" width="{_short(width)}" height="{_short(height)}"/>',
            *body,
            "</svg>\n",
        ]
    )


def with_plain_colours(style: str, scheme: str) -> str:
    """Put a plain colour before each variable: what knows no variables (rsvg, Inkscape) would else draw all in black."""
    colours = dict(entry.split(":") for entry in scheme.split(";"))
    return _VARIABLE.sub(lambda found: f"{found[1]}:{colours[found[2]]};{found[0]}", style)


def text(x: float, y: float, what: str, style: str = "") -> str:
    """Return a line of text at a place."""
    kind = f' class="{style}"' if style else ""
    return f'<text x="{_short(x)}" y="{_short(y)}"{kind}>{clean(what)}</text>'


def shown(what: str) -> str:
    """Replace characters that cannot be printed in a text from elsewhere, so that it is fit for XML."""
    return "".join(c if c.isprintable() else "\ufffd" for c in what)


def clean(what: str) -> str:
    """Make a text from elsewhere fit for XML: shown, and escaped."""
    # As html.escape does, whose module has a table of 2,000 names.
    for character, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#x27;")):
        what = what.replace(character, name)
    return shown(what)


def shortened(what: str, characters_max: int) -> str:
    """Return a text without its middle if it is too long, because names differ at their ends."""
    if len(what) <= characters_max:
        return what
    tail = (characters_max - 1) // 2
    return f"{what[: characters_max - 1 - tail]}…{what[-tail:]}"


def ramp(index: int, count: int) -> RGB:
    """Return the colour of one of `count` bands, of which 0 is the head's."""
    at = index / max(count - 1, 1) * (len(_RAMP) - 1)
    low = min(int(at), len(_RAMP) - 2)
    part = at - low
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return red, green, blue


def hexadecimal(colour: RGB) -> str:
    """Write a colour as CSS does."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
