"""Results as one self-contained HTML page, and its drawings alone as SVG; everything that was not
written here is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from nexus_rt.bench.cells import Cells, done, machine, names, terms
from nexus_rt.bench.schema import Curve, Fit, Peer, Quality, Row, report_of, unit_of

COLOURS = {
    "small": "#2a9d8f",
    "large": "#264653",
    "both": "#e9c46a",
    "text": "#8ab17d",
    "understanding": "#b5838d",
    "connector": "#6d6875",
    "prepare": "#a8dadc",
    "blend": "#e9c46a",
    "solver": "#e76f51",
    "swap": "#c1121f",
    "vae": "#457b9d",
    "encode-to-mp4": "#adb5bd",
}
# the steps
BEFORE, AFTER = (
    ("text", "understanding", "connector", "prepare"),
    ("vae", "encode-to-mp4"),
)
CEILING = 60.0  # decibels
INK = "#222"
CELLS = Cells("—", ",.1f", " dB", ("<b>", "</b>"))
ROWS = {  # figure -> title
    "plan": "plan",
    "engine": "engine",
    "p50": "p50 ms",
    "p95": "p95 ms",
    "denoise": "denoise ms",
    "vae": "vae ms",
    "cold": "cold ms",
    "preview": "preview ms",
    "swap": "swap",
    "predicted": "predicted",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "error": "latent error",
    "right": "accuracy",
    "host": "host peak",
    "device": "device peak",
}
PEERS = {
    "peer": "peer",
    "plan": "our plan",
    "ours": "ours ms",
    "theirs": "theirs ms",
    "ratio": "theirs / ours",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "error": "latent difference",
}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #e5e5e5;white-space:nowrap}
th:first-child,td:first-child,td.l,th.l{text-align:left}thead th{border-bottom:2px solid #999;color:#555;font-weight:600}
.note{color:#666;font-size:13px}.bad{color:#a4161a}figure{margin:0 0 1.2rem}figcaption{font-size:13px;color:#444}
img{height:96px;image-rendering:pixelated;border:1px solid #ddd}code{background:#f4f4f4;padding:.1rem .3rem}
.clips{display:flex;flex-wrap:wrap;gap:0 1.5rem}
.key span{display:inline-block;margin-right:1rem;font-size:12px}
.key i{display:inline-block;width:11px;height:11px;margin-right:4px}
"""


def figure(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "—" if value is None else f"{value:,.{digits}f}{unit}"


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """An HTML table of cells already escaped; the first `left` columns are text."""
    mark = lambda i: ' class="l"' if i < left else ""
    top = "".join(f"<th{mark(i)}>{h}</th>" for i, h in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{mark(i)}>{c}</td>" for i, c in enumerate(r)) + "</tr>" for r in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _rows_table(rows: Sequence[Row | Peer], columns: Mapping[str, str]) -> str:
    """A table of rows, one that failed with why; columns: name of a figure -> its title."""
    body = []
    for row in rows:
        if row.failed is not None:
            start = [*map(escape, names(row)), f'<span class="bad">{escape(row.failed)}</span>']
            body.append([*start, *[""] * (len(columns) - len(start))])
        else:
            cells = CELLS.figures(row)
            body.append([cells[n] if n == "ratio" else escape(cells[n]) for n in columns])
    return table(list(columns.values()), body, 2)


def key(parts: list[str]) -> str:
    items = (
        f'<span><i style="background:{COLOURS.get(n, "#888")}"></i>{escape(n)}</span>'
        for n in parts
    )
    return '<p class="key">' + "".join(items) + "</p>"


def _bars(
    pieces: list[tuple[str, float, str]], scale: float, y: float, height: float, left: float
) -> str:
    """Rectangles side by side: (colour's name, milliseconds, tip)."""
    out, x = [], left
    for name, ms, tip in pieces:
        width = ms * scale
        out.append(
            f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0.1):.2f}" height="{height}"'
            f' fill="{COLOURS.get(name, "#888")}" stroke="#fff"'
            f' stroke-width=".4"><title>{escape(tip)}: {ms:.2f} ms</title></rect>'
        )
        x += width
    return "".join(out)


def timeline(rows: list[Row]) -> str:
    """A bar a row: what comes before the steps, every step in the colour of what it ran, what comes
    after."""
    left, width, pitch = 230, 900, 26
    longest = max((r.total_duration_ms for r in rows), default=1.0)
    scale, out = width / longest, []
    for i, r in enumerate(rows):
        parts, y = r.components_ms, 8 + i * pitch
        pieces = [(n, parts[n], n) for n in BEFORE if n in parts]
        pieces += [(s.runs, s.duration_ms, f"step {s.step} ({s.runs})") for s in r.denoise_steps_ms]
        pieces += [(n, parts[n], n) for n in AFTER if n in parts]
        label = f"{r.plan} on {r.engine}"
        out.append(_text(left - 8, y + 14, label[:36], 12, "end", INK))
        out.append(_bars(pieces, scale, y, 18, left))
    y = 14 + len(rows) * pitch
    for share in (0, 0.25, 0.5, 0.75, 1):
        out.append(_text(left + share * width, y + 8, f"{share * longest:.0f} ms"))
    return _svg(left + width + 40, y + 16, "".join(out))


def _height(q: Quality) -> float | None:
    """Decibels, at most CEILING; None where they are not known."""
    if q.identical:
        return CEILING
    return None if q.psnr_db is None else min(q.psnr_db, CEILING)


def scatter(rows: list[Row]) -> str:
    """Every row's time against its frames' PSNR to the reference, numbered; above CEILING no eye
    tells them apart."""
    shown = [(r, value) for r in rows if (value := _height(r.quality)) is not None]
    if not shown:
        return ""
    left, top, width, height = 60, 24, 620, 300
    low = min(20.0, *(value for _, value in shown)) - 5
    slowest = 1.1 * max(r.total_duration_ms for r, _ in shown)
    out = _axes((left, top, width, height), (0, slowest), (low, CEILING), 5, 11)
    engines = list(dict.fromkeys(r.engine for r, _ in shown))
    palette = ["#264653", "#e76f51", "#2a9d8f", "#b08900", "#6d6875"]
    for i, (r, value) in enumerate(shown):
        x = left + width * r.total_duration_ms / slowest
        y = top + height * (1 - (value - low) / (CEILING - low))
        fill = palette[engines.index(r.engine) % len(palette)]
        title = f"{i + 1} {r.plan} on {r.engine}"
        figures = f"{r.total_duration_ms:.0f} ms, {CELLS.psnr(r.quality, ' dB')}"
        out += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="{fill}"'
            f' fill-opacity=".85"><title>{escape(title)}</title></circle>',
            _text(x, y + 3.5, f"{i + 1}", 10, fill="#fff"),
            _text(left + width + 20, top + 12 + 17 * i, f"{title}: {figures}", 12, "start", fill),
        ]
    words = f"PSNR to the reference plan, dB (top: {CEILING:.0f} up)"
    out += [
        _text(left + width / 2, top + height + 34, "end to end, ms", 12, fill=INK),
        _text(14, top - 10, words, 12, "start", INK),
    ]
    return _svg(
        left + width + 400, max(top + height + 44, top + 20 + 17 * len(shown)), "".join(out)
    )


def lines(points: list[tuple[float, float]], fit: Fit | None, x_name: str) -> str:
    """Measured points and the fitted curve."""
    if len(points) < 2:
        return ""
    left, top, width, height = 52, 10, 300, 170
    xs, ys = zip(*points, strict=True)
    wide, tall = 1.05 * max(xs), 1.1 * max(ys) or 1.0
    at = lambda x, y: f"{left + width * x / wide:.1f},{top + height * (1 - y / tall):.1f}"
    out = _axes((left, top, width, height), (0, wide), (0, tall), 3, 10)
    if fit:
        curve = [
            (x, sum(c * x**p for c, p in zip(fit.coefficients, fit.powers, strict=True)))
            for x in (wide * i / 40 for i in range(41))
        ]
        path = " ".join(at(x, min(max(y, 0), tall)) for x, y in curve)
        out.append(f'<polyline points="{path}" fill="none" stroke="#e76f51" stroke-width="1.5"/>')
    for x, y in points:
        px, py = at(x, y).split(",")
        out.append(
            f'<circle cx="{px}" cy="{py}" r="3.5" fill="#264653"><title>{x:g}: {y:g}'
            " ms</title></circle>"
        )
    out.append(_text(left + width / 2, top + height + 27, x_name, fill=INK))
    return _svg(left + width + 20, top + height + 34, "".join(out))


def _text(
    x: float, y: float, words: str, size: int = 11, anchor: str = "middle", fill: str = "#666"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
        f' fill="{fill}">{escape(words)}</text>'
    )


def _axes(
    box: tuple[float, float, float, float],
    across: tuple[float, float],
    up: tuple[float, float],
    count: int,
    size: int,
) -> list[str]:
    """A frame and `count` numbers along its lower and its left side.

    Args:
        box: left, top, width and height. across, up: the values at its ends.
    """
    left, top, width, height = box
    out = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#bbb"/>'
    ]
    for i in range(count):
        share = i / (count - 1)
        x, y = left + width * share, top + height * (1 - share)
        across_here, up_here = (a + (b - a) * share for a, b in (across, up))
        out += [
            _text(left - 6, y + 4, f"{up_here:.0f}", size, "end"),
            _text(x, top + height + size + 4, f"{across_here:.0f}", size),
        ]
    return out


def _svg(width: float, height: float, inside: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
        f' width="{width:.0f}" font-family="system-ui,sans-serif"'
        f' style="max-width:100%">{inside}</svg>'
    )


def _scaling(scaling: Mapping[str, Mapping[str, Curve]]) -> str:
    out = []
    for axis, curves in scaling.items():
        unit = unit_of(axis)
        for name, curve in curves.items():
            points = [(x, p.ms) for p in curve.points if (x := p.at(unit)) is not None]
            fit, words = curve.fit, "too few points to fit"
            if fit:
                words = f"ms = {terms(fit, unit)} (R² {fit.r2:.4f})"
            out.append(
                f"<figure>{lines(points, fit, unit)}<figcaption>{escape(f'over {axis}, {name}: {words}')}</figcaption></figure>"
            )
    return f'<h2>Scaling</h2><div class="clips">{"".join(out)}</div>'


# A page runs nothing and asks for nothing, whatever stood in the files that it shows.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action"
    " 'none'"
)


def document(title: str, body: list[str], style: str = "") -> str:
    """A page of elements already escaped; style: beside `STYLE`."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="viewport"'
        ' content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>{''.join(body)}</body></html>\n"
    )


def page(results: dict[str, Any]) -> str:
    """The whole page of a results file.

    Raises:
        ModelError: the results are none.
    """
    report = report_of(results, "the results")
    mark, rows = report.fingerprint, done(report.rows)
    body = [
        f"<h1>Latency: {escape(report.preset)}</h1>",
        (
            f'<p class="note">{escape(machine(mark))}; {escape(mark.when)};'
            f" <code>{escape(mark.command)}</code></p>"
        ),
        *(f'<p class="note">{escape(note)}</p>' for note in report.notes),
    ]
    if report.prompt:
        body.append(f"<p>Prompt: {escape(report.prompt)}</p>")
    if report.estimate is not None:
        made = [
            [escape(r.plan), str(r.steps), CELLS.time(r.denoise_ms_at_least)]
            for r in report.estimate.rows
        ]
        body += [
            "<h2>Estimate</h2>",
            table(["plan", "steps", "denoising takes at least, ms"], made),
        ]
    if report.rows:
        parts = [n for n in COLOURS if n in ("both", "small", "large", *BEFORE, *AFTER)]
        body += [
            "<h2>Plans and engines</h2>",
            _rows_table(report.rows, ROWS),
            "<h2>Where the time goes</h2>",
            key(parts),
            timeline(rows),
        ]
        if drawn := scatter(rows):
            body += ["<h2>Speed and quality</h2>", drawn]
    if report.peers:
        body += ["<h2>Peers, in the same run</h2>", _rows_table(report.peers, PEERS)]
    if report.scaling:
        body.append(_scaling(report.scaling))
    if pictures := [(r, r.thumbnail) for r in report.rows if r.thumbnail]:
        body.append('<h2>Clips</h2><div class="clips">')
        body += [
            f'<figure><img src="{escape(url, quote=True)}"'
            f' alt="frames"><figcaption>{escape(r.plan)} on '
            f"{escape(r.engine)}: {CELLS.time(r.total_duration_ms or None)} ms</figcaption></figure>"
            for r, url in pictures
        ]
        body.append("</div>")
    kept = ", ".join(f"{k} {v}" for k, v in mark.versions.items())
    body.append(
        f'<p class="note">{escape(kept)}; weights {escape(str(mark.weights or "random"))}</p>'
    )
    return document(f"Latency: {report.preset}", body)


def drawing(results: dict[str, Any]) -> str:
    """Timeline and scatter as one SVG file.

    Raises:
        ModelError: the results are none.
    """
    rows = done(report_of(results, "the results").rows)
    height = 40 + 26 * len(rows)
    parts = [timeline(rows).replace("<svg ", '<svg x="0" y="0" ', 1)]
    if drawn := scatter(rows):
        parts.append(drawn.replace("<svg ", f'<svg x="0" y="{height}" ', 1))
    return _svg(1180, height + (380 if len(parts) > 1 else 0), "".join(parts))
