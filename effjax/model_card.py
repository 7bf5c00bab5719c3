"""The card (README.md) of a compressed model: what it is, what it cost, how to make and use it."""

from typing import Any

from effjax.compress import Survey, Variant
from effjax.report_html.page import size


def card(survey: Survey, variant: Variant) -> str:
    """Markdown for one variant of a survey; no local paths in it."""
    original, comparison = survey.variants[0], variant.comparison
    kinds: dict[str, int] = {}
    for row in variant.leaves:
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
    lines = [
        f"# {survey.model.source}, compressed with effjax",
        "",
        f"{variant.summary}.",
        "",
        "| | original | compressed |",
        "| --- | --- | --- |",
        f"| bytes | {original.nbytes:,} | {variant.nbytes:,} ({variant.ratio:.2f} times smaller) |",
    ]
    if comparison is not None:
        lines += [
            f"| perplexity | {comparison.perplexity_reference:.3f} | {comparison.perplexity:.3f} |",
            f"| ΔNLL, nats per token | | {comparison.delta_nll:+.4f}, {comparison.confidence:.0%} interval "
            f"{comparison.interval} |",
            f"| KL divergence | | mean {comparison.kl_mean:.4f}, 99.9 % quantile {comparison.kl_q999:.3f} |",
            f"| same top-1 | | {comparison.same_top1:.2%} |",
            f"| verdict | | {comparison.verdict} |",
            "",
            f"Judged on {survey.text}: {comparison.windows} windows, {comparison.tokens} tokens, both models "
            f"on the same windows. Rule: {comparison.rule}.",
        ]
    else:
        lines += ["", "Not judged yet: `effjax eval` compares it with its original."]
    lines += [
        "",
        f"Tensors: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}; {size(variant.nbytes)} in all.",
        "",
        "## Make it again",
        "",
        "The file recipe.yaml holds every setting:",
        "",
        "    effjax compress MODEL --rules recipe.yaml --out NEW_DIRECTORY",
        "",
        "## Use it",
        "",
        "    effjax generate DIRECTORY --prompt 'Return a'",
        "    effjax verify DIRECTORY",
        "    effjax eval DIRECTORY --original MODEL",
    ]
    if variant.sample is not None and survey.sampling is not None:
        quoted = _quoted(survey.sampling.prompt + variant.sample)
        lines += ["", "## Sample", "", str(survey.sampling), "", *quoted]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> list[Any]:
    return [f"> {line}".rstrip() for line in text.splitlines()]
