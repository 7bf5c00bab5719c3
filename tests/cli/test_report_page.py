"""The page says what the data says, for the awkward cases too: not finite, stacked layers, markup in a text."""

import json
from typing import Any

import pytest

from effjax.report_html import render
from effjax.report_html.figures import layer_errors
from effjax.report_html.page import count, size


def variant(name: str, **changes: Any) -> dict[str, Any]:
    leaves = [
        {"path": "embed/embedding", "role": "embedding", "layer": None, "shape": [8, 4], "nbytes": 128, "errors": []},
        {"path": "layers_0/mlp/kernel", "role": "mlp", "layer": 0, "shape": [4, 4], "nbytes": 64, "errors": [0.1]},
        {"path": "layers_1/mlp/kernel", "role": "mlp", "layer": 1, "shape": [4, 4], "nbytes": 64, "errors": [0.2]},
    ]
    comparison = {
        "perplexity": 12.0,
        "perplexity_ratio": 1.2,
        "delta_nll": 0.18,
        "delta_low": 0.15,
        "delta_high": 0.21,
        "kl_mean": 0.1,
        "kl_q999": 1.5,
        "same_top1": 0.8,
        "verdict": "worse",
    }
    made = {
        "name": name,
        "summary": "RTN bits 4",
        "recipe": {"rules": []},
        "nbytes": 256,
        "ratio": 2.0,
        "leaves": [leaf | {"kind": "Quantized"} for leaf in leaves],
        "comparison": comparison,
        "perplexity": 12.0,
        "sample": " of it",
    }
    return made | changes


def report(*variants: dict[str, Any]) -> dict[str, Any]:
    dense = variant("dense", comparison=None, recipe=None, ratio=1.0, nbytes=512, perplexity=10.0)
    return {
        "format": 1,
        "model": {"name": "small", "parameters": 64, "nbytes": 512, "dtype": "float32"},
        "evaluation": {
            "text": "a text",
            "windows": 6,
            "tokens": 186,
            "confidence": 0.95,
            "rule": {"margin": 0.02, "slight": 0.1, "broken": 1.0},
            "rule_text": "the rule",
        },
        "prompt": "All",
        "sampling": "Up to 3 tokens",
        "variants": [dense, *variants],
        "command": "effjax compress",
        "environment": {"jax": "0"},
    }


def not_finite(name: str) -> dict[str, Any]:
    found = variant(name)
    values = dict.fromkeys(("perplexity", "delta_nll", "delta_low", "delta_high", "kl_mean", "kl_q999"))
    found["comparison"] |= values | {"verdict": "broken"}
    return found


def test_numbers_reach_the_page() -> None:
    page = render(report(variant("4-bit")))
    for text in ("4-bit", "2.00×", "12.00", "+0.1800", "[+0.1500, +0.2100]", "0.1000", "80.0%", "worse", "186 tokens"):
        assert text in page
    assert page.count("<svg") == 3
    assert "<b>All</b> of it" in page


def test_headline_names_the_smallest_at_each_quality() -> None:
    good = variant("8-bit", nbytes=400, ratio=1.28)
    good["comparison"] = good["comparison"] | {"verdict": "indistinguishable", "perplexity_ratio": 1.01}
    better = variant("6-bit", nbytes=300, ratio=1.71)
    better["comparison"] = better["comparison"] | {"verdict": "indistinguishable", "perplexity_ratio": 1.015}
    page = render(report(good, better, not_finite("1-bit")))
    cards = page[page.index("class='cards'") : page.index("<table")]
    assert "6-bit <span>1.71× smaller" in cards and "perplexity +1.5%" in cards
    assert "8-bit" not in cards and "1-bit" in cards and "do not use" in cards


def test_not_finite_is_said() -> None:
    page = render(report(not_finite("1-bit")))
    assert page.count("not finite") >= 4 and "nan" not in page.lower().replace("finance", "")


def test_markup_in_texts_is_text() -> None:
    page = render(report(variant("4-bit", sample="<script>alert(1)</script> & so")))
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so" in page


def test_same_data_same_page() -> None:
    data = json.loads(json.dumps(report(variant("4-bit"), variant("2:4"))))
    assert render(data) == render(data)


def test_layer_errors_of_unrolled_and_stacked_layers() -> None:
    assert layer_errors(variant("4-bit")) == pytest.approx({0: 0.1, 1: 0.2})
    stacked = {"layer": None, "errors": [0.3, 0.4]}
    assert layer_errors({"leaves": [stacked, stacked | {"errors": [0.3, None]}]}) == pytest.approx({0: 0.3, 1: 0.4})
    assert layer_errors({"leaves": [{"layer": None, "errors": [0.3]}]}) == {}


def test_no_error_plot_without_layers() -> None:
    flat = variant("4-bit")
    for leaf in flat["leaves"]:
        leaf["layer"] = None
    page = render(report(flat))
    assert page.count("<svg") == 2 and "Error by layer" not in page


def test_sizes_for_people() -> None:
    assert [size(n) for n in (7, 999_000, 6_558_208, 12_345_000_000)] == ["7 B", "999 KB", "6.56 MB", "12.3 GB"]
    assert count(260_032) == "260,032"
