"""The page itself: headline, table with bars, plots, samples side by side, details; no script, nothing from outside."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from effjax.report_html import figures
from effjax.report_html.style import STYLE

Variant = Mapping[str, Any]


def render(report: Mapping[str, Any]) -> str:
    """The HTML of a report.

    Args:
        report: the contents of report.json, see `effjax.compress.Survey.to_dict`; the first variant is the original.

    Returns:
        One page without references to anything outside itself.
    """
    variants = report["variants"]
    evaluation = report["evaluation"]
    error_plot = figures.error_by_layer(variants[1:])
    sections = [
        _header(report),
        _cards(variants),
        _table(variants),
        _figure_section(
            "What it cost",
            "Each dot is the loss of a compressed model against the original on the same windows; the bar is its "
            "interval. Left is better. The axis is linear inside the margin and logarithmic beyond.",
            figures.quality(variants, evaluation["rule"], evaluation["confidence"]),
        ),
        _figure_section(
            "Where the bytes are",
            "True container bytes: packed codes, scales and zero points included.",
            figures.size_by_tensor(variants),
        ),
    ]
    if error_plot is not None:
        sections.append(
            _figure_section(
                "Error by layer",
                "‖W − Ŵ‖ / ‖W‖ of the compressed matrices, root mean square over each layer.",
                error_plot,
            )
        )
    sections += [_samples(report), _details(report)]
    title = escape(f"effjax report: {report['model']['name']}")
    body = "\n".join(section for section in sections if section)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _header(report: Mapping[str, Any]) -> str:
    model, evaluation = report["model"], report["evaluation"]
    return (
        f"<header><p class='kicker'>effjax report</p><h1>{escape(model['name'])}, compressed</h1>"
        f"<p class='lead'>{count(model['parameters'])} parameters, {size(model['nbytes'])} as "
        f"{escape(model['dtype'])}. Judged on {escape(evaluation['text'])}: "
        f"{evaluation['windows']} windows, {evaluation['tokens']:,} tokens, "
        "every compressed model paired with the original on the same windows.</p></header>"
    )


def _cards(variants: Sequence[Variant]) -> str:
    """What a reader wants to know first: the smallest model at each level of quality."""
    cards = []
    for verdicts, title in (
        (("indistinguishable",), "smallest that is indistinguishable"),
        (("slightly worse",), "smallest that is slightly worse"),
        (("broken",), "broken"),
    ):
        found = [v for v in variants[1:] if v["comparison"]["verdict"] in verdicts]
        if not found:
            continue
        best = min(found, key=lambda v: v["nbytes"])
        colour = figures.VERDICT_COLOURS[verdicts[0]]
        if verdicts == ("broken",):
            big, small = ", ".join(escape(v["name"]) for v in found), "do not use"
        else:
            ratio = best["comparison"]["perplexity_ratio"]
            big = f"{escape(best['name'])} <span>{best['ratio']:.2f}× smaller</span>"
            small = f"{size(best['nbytes'])}, perplexity {(ratio - 1):+.1%}"
        cards.append(
            f"<div class='card' style='border-color:{colour}'><p style='color:{colour}'>{title}</p>"
            f"<strong>{big}</strong><small>{small}</small></div>"
        )
    return f"<section class='cards'>{''.join(cards)}</section>" if cards else ""


def _table(variants: Sequence[Variant]) -> str:
    largest = max(v["nbytes"] for v in variants)
    rows = []
    for variant in variants:
        comparison = variant["comparison"]
        bar = (
            f"<div class='bar'><i style='width:{100 * variant['nbytes'] / largest:.1f}%'></i></div>"
            f"<span>{size(variant['nbytes'])}</span>"
        )
        quality = (
            [
                number(comparison["perplexity"], ".2f"),
                f"{number(comparison['delta_nll'], '+.4f')}<small>{interval(comparison)}</small>",
                f"{number(comparison['kl_mean'], '.4f')}<small>{number(comparison['kl_q999'], '.2f')}</small>",
                number(comparison["same_top1"], ".1%"),
                _pill(comparison["verdict"]),
            ]
            if comparison
            else [number(variant["perplexity"], ".2f"), "", "", "", "<em>original</em>"]
        )
        cells = [
            f"<b>{escape(variant['name'])}</b><small>{escape(variant['summary'])}</small>",
            f"<div class='size'>{bar}</div>",
            f"{variant['ratio']:.2f}×",
            *quality,
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = (
        "model",
        "size",
        "ratio",
        "perplexity",
        "ΔNLL <small>interval</small>",
        "KL <small>99.9 %</small>",
        "same top-1",
        "verdict",
    )
    head = "".join(f"<th>{h}</th>" for h in heads)
    return (
        f"<section><table class='main'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def _figure_section(title: str, text: str, svg: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p><figure>{svg}</figure></section>"


def _samples(report: Mapping[str, Any]) -> str:
    shown = [v for v in report["variants"] if v["sample"] is not None]
    if not shown:
        return ""
    prompt = escape(report["prompt"])
    blocks = "".join(
        f"<div class='sample'><h3>{escape(v['name'])} "
        f"{_pill(v['comparison']['verdict']) if v['comparison'] else ''}</h3>"
        f"<p><b>{prompt}</b>{escape(v['sample'])}</p></div>"
        for v in shown
    )
    return (
        f"<section><h2>The same prompt, continued by each</h2><p>{escape(report['sampling'])}</p>"
        f"<div class='samples'>{blocks}</div></section>"
    )


def _details(report: Mapping[str, Any]) -> str:
    parts = [f"<p><b>Verdict rule.</b> {escape(report['evaluation']['rule_text'])}.</p>"]
    if report.get("command"):
        parts.append(f"<p><b>Made with</b> <code>{escape(report['command'])}</code></p>")
    environment = ", ".join(f"{k} {v}" for k, v in report["environment"].items())
    parts.append(f"<p><b>Environment.</b> {escape(environment)}</p>")
    for variant in report["variants"]:
        rows = "".join(
            f"<tr><td>{escape(leaf['path'])}</td><td>{escape('×'.join(map(str, leaf['shape'])))}</td>"
            f"<td>{escape(leaf['kind'])}</td><td>{leaf['nbytes']:,}</td><td>{_leaf_error(leaf)}</td></tr>"
            for leaf in variant["leaves"]
        )
        recipe = f"<pre>{escape(json.dumps(variant['recipe'], indent=1))}</pre>" if variant["recipe"] else ""
        parts.append(
            f"<details><summary>{escape(variant['name'])}: {len(variant['leaves'])} tensors, "
            f"{variant['nbytes']:,} bytes</summary>{recipe}"
            f"<table class='leaves'><thead><tr><th>tensor</th><th>shape</th><th>held as</th><th>bytes</th>"
            f"<th>relative error</th></tr></thead><tbody>{rows}</tbody></table></details>"
        )
    return f"<section><h2>Details</h2>{''.join(parts)}</section>"


def _leaf_error(leaf: Mapping[str, Any]) -> str:
    errors = [e for e in leaf["errors"] if e is not None]
    return "" if not errors else f"{sum(errors) / len(errors):.3%}"


def _pill(verdict: str) -> str:
    return f"<span class='pill' style='background:{figures.VERDICT_COLOURS[verdict]}'>{escape(verdict)}</span>"


def interval(comparison: Mapping[str, Any]) -> str:
    """`[low, high]` of ΔNLL, or nothing where it is not finite."""
    low, high = comparison["delta_low"], comparison["delta_high"]
    return "" if low is None or high is None else f"[{low:+.4f}, {high:+.4f}]".replace("-", "\N{MINUS SIGN}")


def number(value: float | None, spec: str) -> str:
    """A formatted number; None stands for one that is not finite."""
    return "not finite" if value is None else format(value, spec)


def size(nbytes: int) -> str:
    """Bytes for people, decimal units.

    Example:
        >>> size(1_234_567), size(999)
        ('1.23 MB', '999 B')
    """
    for unit, divisor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if nbytes >= divisor:
            return f"{nbytes / divisor:.3g} {unit}" if nbytes < 1000 * divisor else f"{nbytes / divisor:,.0f} {unit}"
    return f"{nbytes} B"


def count(number: int) -> str:
    """A count for people.

    Example:
        >>> count(2_150_000), count(7_000_000_000)
        ('2.15 million', '7 billion')
    """
    for unit, divisor in ((" billion", 10**9), (" million", 10**6)):
        if number >= divisor:
            return f"{number / divisor:.3g}{unit}"
    return f"{number:,}"
