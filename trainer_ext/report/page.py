"""The run report as one self-contained HTML page with inline pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence

import torch

from ..ranking.scores import ImportanceScores

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse}td,th{padding:.2rem 1rem .2rem 0;text-align:left;vertical-align:top}
td{font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));gap:.6rem}
figure{margin:0}figcaption{font-size:11px;color:#555;overflow-wrap:anywhere}
svg{background:#f6f6fa;border-radius:4px}
"""
_SELECTED = "#d1495b"
_OTHER = "#9db4c0"
_POINTS = 60  # of a layer's sorted scores that are drawn
_BINS = 40  # into which a layer's neurons are sorted by position


def render_page(report: dict, scores: ImportanceScores | None) -> str:
    """The page for a report made by `build_report`; loads nothing from anywhere."""
    sections = [
        f"<h1>SPFT run: {html.escape(str(report['config'].get('base_model_name_or_path')))}</h1>",
        _summary(report),
        "<h2>Loss</h2>",
        _loss_curve(report["train_loss"], report["held_out_loss"]),
    ]
    if scores is not None:
        sections += [
            "<h2>Importance scores of each layer, sorted; the cut</h2>",
            f"<p>Left of the cut ({_SELECTED_WORD}): the neurons that are trained. The scale of "
            "each picture is its layer's own highest score.</p>",
            _grid(report, lambda name, layer: _score_curve(scores.scores[name], layer)),
        ]
    sections += [
        "<h2>Where the selected neurons lie in each layer</h2>",
        "<p>Neurons from first to last; the height of a bar is the share that is trained.</p>",
        _grid(report, lambda name, layer: _positions(layer)),
    ]
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>SPFT run report</title>"
        f"<style>{_STYLE}</style><body>{''.join(sections)}</body></html>"
    )


_SELECTED_WORD = f"<span style='color:{_SELECTED}'>red</span>"


def _summary(report: dict) -> str:
    calibration = report["calibration"] or {}
    rows = {
        "trainable parameters": f"{report['trainable_parameters']:,} "
        f"({report['trainable_share']:.2%} of {report['base_parameters']:,})",
        "optimizer state": f"{report['optimizer_state_bytes'] / 2**20:.1f} MiB",
        "peak memory": f"{report['peak_memory_bytes'] / 2**30:.2f} GiB",
        "median step": _seconds(report["step_seconds"]),
        "importance": f"{calibration.get('metric', 'loaded with the adapter')}, "
        f"{calibration.get('batches', 0)} batches, {_seconds(calibration.get('seconds'))}",
        "device": f"{report['device']}, base in {report['base_dtype']}, "
        f"{report['world_size']} process(es)",
        "versions": ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
    }
    if calibration.get("agreement_of_halves") is not None:
        rows["two halves of the data"] = (
            f"agree by {calibration['agreement_of_halves']:.2f} beyond chance (median of the "
            "layers; 1: the same neurons, 0: as two random selections)"
        )
    if calibration.get("silent_layers"):
        rows["layers without a gradient"] = ", ".join(calibration["silent_layers"])
    for number, warning in enumerate(calibration.get("warnings", ()), start=1):
        rows[f"warning {number}"] = warning
    cells = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>"


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} s"


def _grid(report: dict, picture) -> str:
    figures = "".join(
        f"<figure>{picture(name, layer)}<figcaption>{html.escape(name)}<br>"
        f"{len(layer['selected'])} of {layer['neurons']}{_overlap(layer)}</figcaption></figure>"
        for name, layer in report["layers"].items()
    )
    return f"<div class='grid'>{figures}</div>"


def _overlap(layer: dict) -> str:
    overlap = layer.get("overlap_of_halves")
    return "" if overlap is None else f"; halves share {overlap:.0%}"


def _score_curve(layer_scores: torch.Tensor, layer: dict, width=160, height=60) -> str:
    ordered = layer_scores.sort(descending=True).values
    picks = torch.linspace(0, len(ordered) - 1, min(_POINTS, len(ordered))).round().long()
    top = max(ordered[0].item(), 1e-300)
    points = [
        (width * (i + 0.5) / len(ordered), height * (1 - ordered[i].item() / top))
        for i in picks.tolist()
    ]
    cut = width * len(layer["selected"]) / len(ordered)
    return _svg(
        f"<rect width='{cut:.1f}' height='{height}' fill='{_SELECTED}' opacity='.18'/>"
        f"<line x1='{cut:.1f}' x2='{cut:.1f}' y2='{height}' stroke='{_SELECTED}'/>"
        + _line(points, _OTHER),
        width,
        height,
    )


def _positions(layer: dict, width=160, height=40) -> str:
    bins = min(_BINS, layer["neurons"])
    counts = torch.histc(
        torch.tensor(layer["selected"], dtype=torch.float64), bins, 0, layer["neurons"]
    )
    sizes = torch.histc(
        torch.arange(layer["neurons"], dtype=torch.float64), bins, 0, layer["neurons"]
    )
    bars = "".join(
        f"<rect x='{i * width / bins:.1f}' y='{height * (1 - share):.1f}' "
        f"width='{width / bins:.2f}' height='{height * share:.1f}' fill='{_SELECTED}'/>"
        for i, share in enumerate((counts / sizes).tolist())
        if share
    )
    return _svg(bars, width, height)


def _loss_curve(train: Sequence, held_out: Sequence, width=900, height=220, margin=40) -> str:
    points = [*train, *held_out]
    if not points:
        return "<p>No loss was logged.</p>"
    last_step = max(max(step for step, _ in points), 1)
    low, high = min(v for _, v in points), max(v for _, v in points)
    span = max(high - low, 1e-9)

    def place(curve):
        return [
            (
                margin + (width - 2 * margin) * step / last_step,
                margin / 2 + (height - 1.5 * margin) * (high - value) / span,
            )
            for step, value in curve
        ]

    marks = "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4'/>" for x, y in place(held_out))
    labels = (
        f"<text x='2' y='{margin / 2 + 4}'>{high:.2f}</text>"
        f"<text x='2' y='{height - margin}'>{low:.2f}</text>"
        f"<text x='{width / 2}' y='{height - 6}'>optimizer step (0 to {last_step})</text>"
        f"<text x='{margin + 10}' y='{height - 22}' fill='{_OTHER}'>training</text>"
        f"<text x='{margin + 80}' y='{height - 22}' fill='{_SELECTED}'>held out</text>"
    )
    return _svg(
        _line(place(train), _OTHER)
        + f"<g fill='{_SELECTED}'>{_line(place(held_out), _SELECTED)}{marks}</g>"
        + f"<g font-size='12' font-family='sans-serif'>{labels}</g>",
        width,
        height,
    )


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.5'/>"


def _svg(content: str, width: int, height: int) -> str:
    return (
        f"<svg viewBox='0 0 {width} {height}' width='100%' role='img' "
        f"xmlns='http://www.w3.org/2000/svg'>{content}</svg>"
    )
