"""The loss plot: a few hundred points as one small SVG, quicker to send and redraw than a chart component."""

from __future__ import annotations

from html import escape

from studio.render import Curve, smoothed

WIDTH, HEIGHT = 600, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26
COLORS = ("var(--color-accent)", "#d97706", "#7c6bd6", "#c2477f", "#4b8fd1", "#7a8b3c")  # told apart in both themes


def loss_plot(curves: dict[str, Curve], total: int) -> str:
    """All curves over the steps: pale raw values with their running mean on top. "" when there is nothing to draw."""
    shown = {name: curve for name, curve in curves.items() if len(curve) >= 2}
    if not shown:
        return ""
    last = max(total, *(curve[-1][0] for curve in shown.values()))
    values = [value for curve in shown.values() for _, value in curve if value == value]
    low, high = _range(values)
    lines = "".join(_line(curve, last, low, high, COLORS[at % len(COLORS)]) for at, curve in enumerate(shown.values()))
    legend = "".join(_legend(name, curve, COLORS[at % len(COLORS)]) for at, (name, curve) in enumerate(shown.items()))
    return (
        f'<figure class="plot"><figcaption>{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss over the training steps">'
        f"{_axes(last, low, high)}{lines}</svg></figure>"
    )


def _range(values: list[float]) -> tuple[float, float]:
    """Zero to a little above the 98th percentile: one wild step must not flatten the rest."""
    ordered = sorted(values) or [1.0]
    top = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))] * 1.1
    low = min(0.0, ordered[0])
    return low, top if top > low else low + 1.0


def _x(step: float, last: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)


def _y(value: float, low: float, high: float) -> float:
    inside = min(max(value, low), high)
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (inside - low) / (high - low)


def _line(curve: Curve, last: int, low: float, high: float, color: str) -> str:
    def points(of: Curve) -> str:
        return " ".join(f"{_x(x, last):.1f},{_y(y, low, high):.1f}" for x, y in of if y == y)

    style = f'fill="none" stroke="{color}" stroke-linejoin="round"'
    return (
        f'<polyline {style} stroke-width="1" opacity="0.28" points="{points(curve)}"/>'
        f'<polyline {style} stroke-width="2.2" points="{points(smoothed(curve))}"/>'
    )


def _axes(last: int, low: float, high: float) -> str:
    parts = []
    for part in (0.0, 0.5, 1.0):
        y = _y(low + part * (high - low), low, high)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{low + part * (high - low):.3g}</text>')
        anchor = ("start", "middle", "end")[round(2 * part)]
        x = _x(part * last, last)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{round(part * last)}</text>')
    return "".join(parts)


def _legend(name: str, curve: Curve, color: str) -> str:
    value = smoothed(curve[-12:])[-1][1]
    return f'<span><i style="background:{color}"></i>{escape(name)} <b>{value:.4g}</b></span>'
