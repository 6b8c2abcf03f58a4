"""The medians as bars, one group a contest, each on a scale of its own: an SVG file without any library."""

from __future__ import annotations

from html import escape

from speed.contests import Contest
from speed.results import Outcome, Results

_WIDTH, _LABELS, _BAR, _ROW, _GAP = 960, 300, 500, 20, 34
_COLOURS = {"floor": "#9aa0a6", "least": "#c8cdd2", "usual": "#c5963d", "peer": "#6f8fbf", "ours": "#2e8b57"}
_ROLES = {"floor": "bare loop", "least": "the least", "usual": "usual recipe", "peer": "others", "ours": "anycard"}
_FONT = "font-family='sans-serif' font-size='12'"


def as_svg(results: Results, contests: list[Contest], title: str) -> str:
    """All contests that were held, one below the other."""
    y = 64
    parts = [_text(12, 24, title, "font-weight='bold'"), *_legend(44)]
    for contest in contests:
        held = [outcome for outcome in results[contest.name].values() if outcome.runs]
        if not held:
            continue
        parts.append(_text(12, y + 14, f"{contest.name} ({contest.cache})", "font-weight='bold'"))
        y += 22
        slowest = max(outcome.median for outcome in held)
        for outcome in held:
            parts += _bar(outcome, slowest, y)
            y += _ROW
        y += _GAP - _ROW
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{y}' viewBox='0 0 {_WIDTH} {y}' {_FONT}>"
    return "\n".join([head, f"<rect width='{_WIDTH}' height='{y}' fill='white'/>", *parts, "</svg>", ""])


def _legend(y: int) -> list[str]:
    parts = []
    for place, (role, words) in enumerate(_ROLES.items()):
        x = 12 + 130 * place
        parts.append(f"<rect x='{x}' y='{y - 10}' width='12' height='12' fill='{_COLOURS[role]}'/>")
        parts.append(_text(x + 18, y, words))
    return parts


def _bar(outcome: Outcome, slowest: float, y: int) -> list[str]:
    """The bar to the median, a line from the fastest to the slowest run, the figure."""
    scale = _BAR / max(slowest, 1e-9)
    length = max(1.0, outcome.median * scale)
    low, high = (_LABELS + min(_BAR * 1.15, value * scale) for value in (min(outcome.seconds), max(outcome.seconds)))
    middle = y + _ROW / 2 - 2
    return [
        _text(_LABELS - 8, y + 12, outcome.label, "text-anchor='end'"),
        f"<rect x='{_LABELS}' y='{y}' width='{length:.1f}' height='{_ROW - 5}' fill='{_COLOURS[outcome.role]}'/>",
        f"<line x1='{low:.1f}' x2='{high:.1f}' y1='{middle}' y2='{middle}' stroke='#333'/>",
        _text(max(_LABELS + length, high) + 6, y + 12, f"{outcome.median * 1e3:,.1f} ms"),
    ]


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' {more}>{escape(text)}</text>"
