"""The rows of benchmarks/quality.py as a table."""

from __future__ import annotations

import statistics


def grouped(rows: list[dict]) -> dict[str, dict[float, list[dict]]]:
    """The rows by case and learning rate, those of a cell by seed."""
    by_case: dict[str, dict[float, list[dict]]] = {}
    for row in sorted(rows, key=lambda row: (row["learning_rate"], row["seed"])):
        by_case.setdefault(row["case"], {}).setdefault(row["learning_rate"], []).append(row)
    return by_case


def mean_loss(rows: list[dict]) -> float:
    return statistics.mean(row["held_out_loss_after"] for row in rows)


def best_losses(rows: list[dict]) -> dict[str, float]:
    """The lowest mean over the seeds of each case, over its learning rates."""
    return {case: min(map(mean_loss, found.values())) for case, found in grouped(rows).items()}


def render(rows: list[dict]) -> str:
    """The table in Markdown, best case first."""
    setting, versions = rows[0]["setting"], rows[0]["versions"]
    by_case = grouped(rows)
    rates = sorted({row["learning_rate"] for row in rows})

    def cell(case: str, rate: float, best: float) -> str:
        found = by_case[case].get(rate)
        if not found:
            return ""
        each = ", ".join(f"{row['held_out_loss_after']:.3f}" for row in found)
        text = f"{mean_loss(found):.3f} ({each})" if len(found) > 1 else each
        return f"**{text}**" if mean_loss(found) == best else text

    lines = [
        f"Held-out loss (nats a token) of SmolLM2-135M after {setting['max_steps']} steps of "
        f"{setting['rows']} docstrings; before: {rows[0]['held_out_loss_before']:.3f}. Mean over "
        f"the seeds, each seed's in brackets; each case's best rate in bold. {setting['device']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, peft "
        f"{versions['peft']}.",
        "",
        f"| case | {' | '.join(f'rate {rate:g}' for rate in rates)} | trained parameters | "
        "halves agree (beyond chance) |",
        "|---|" + "---|" * (len(rates) + 2),
    ]
    best = best_losses(rows)
    for case in sorted(by_case, key=best.get):
        all_rows = [row for found in by_case[case].values() for row in found]
        agreements = [
            r["agreement_of_halves"] for r in all_rows if r["agreement_of_halves"] is not None
        ]
        agreement = f"{statistics.mean(agreements):.2f}" if agreements else ""
        cells = " | ".join(cell(case, rate, best[case]) for rate in rates)
        lines.append(
            f"| {case} | {cells} | {all_rows[0]['trainable_parameters']:,} | {agreement} |"
        )
    return "\n".join([*lines, ""])
