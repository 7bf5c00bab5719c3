"""The paired comparison against numpy written independently, and the cases whose answer is known exactly."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import CalibrationError, ConfigError
from effjax.evaluate import Comparison, VerdictRule, compare, compare_many, perplexity

VOCAB = 11


def apply(variables: dict, tokens: jax.Array) -> jax.Array:
    """A causal toy model: the next token depends on the present one and on the running mean of embeddings."""
    params = variables["params"]
    hidden = params["embedding"][tokens]
    steps = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.float32)[:, None]
    return (hidden + jnp.cumsum(hidden, axis=1) / steps) @ params["kernel"]


def make_params(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "embedding": jnp.asarray(rng.normal(size=(VOCAB, 6)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=(6, VOCAB)), jnp.float32),
    }


def make_windows(count: int = 7, length: int = 9) -> np.ndarray:
    return np.random.default_rng(5).integers(0, VOCAB, (count, length)).astype(np.int32)


def oracle(params: dict, candidate: dict, windows: np.ndarray) -> dict[str, float]:
    """The same numbers in float64, window by window and token by token."""
    nll, nll_reference, kls, same = [], [], [], []
    for row in windows:
        row = row[row >= 0]
        log_probs = []
        for p in (params, candidate):
            embedding, kernel = np.asarray(p["embedding"], np.float64), np.asarray(p["kernel"], np.float64)
            hidden = embedding[row]
            means = np.stack([hidden[: t + 1].mean(axis=0) for t in range(len(row))])
            logits = (hidden + means) @ kernel
            log_probs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        for t in range(len(row) - 1):
            p, q = log_probs[0][t], log_probs[1][t]
            nll_reference.append(-p[row[t + 1]])
            nll.append(-q[row[t + 1]])
            kls.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            same.append(p.argmax() == q.argmax())
    return {
        "nll": np.mean(nll),
        "nll_reference": np.mean(nll_reference),
        "delta_nll": np.mean(nll) - np.mean(nll_reference),
        "perplexity": math.exp(np.mean(nll)),
        "perplexity_reference": math.exp(np.mean(nll_reference)),
        "kl_mean": np.mean(kls),
        "kl_q999": np.quantile(kls, 0.999),
        "same_top1": np.mean(same),
        "tokens": len(nll),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_agrees_with_numpy(batch_size: int, padded: bool) -> None:
    windows = make_windows()
    if padded:
        windows[2, 5:] = -1
        windows[4, 2:] = -1
    got = compare(apply, make_params(0), make_params(1), windows, batch_size=batch_size).to_dict()
    for name, value in oracle(make_params(0), make_params(1), windows).items():
        assert got[name] == pytest.approx(value, rel=2e-6), name
    assert got["delta_low"] <= got["delta_nll"] <= got["delta_high"]
    assert got["perplexity_ratio"] == pytest.approx(got["perplexity"] / got["perplexity_reference"], rel=1e-9)


def test_identical_models_differ_by_exactly_nothing() -> None:
    result = compare(apply, make_params(0), make_params(0), make_windows())
    assert (result.delta_nll, result.delta_low, result.delta_high) == (0.0, 0.0, 0.0)
    assert (result.kl_mean, result.kl_q999, result.same_top1) == (0.0, 0.0, 1.0)
    assert (result.perplexity_ratio, result.verdict) == (1.0, "indistinguishable")


def test_many_candidates_run_the_original_once_a_batch() -> None:
    calls = {"reference": 0, "candidate": 0}

    def counting(variables: dict, tokens: jax.Array) -> jax.Array:
        name = "reference" if "is_reference" in variables["params"] else "candidate"
        jax.debug.callback(lambda: calls.__setitem__(name, calls[name] + 1))
        return apply(variables, tokens)

    windows = make_windows(count=6)
    candidates = {"near": make_params(0), "far": make_params(1)}
    reference = make_params(0) | {"is_reference": jnp.zeros(())}
    results = compare_many(counting, reference, candidates, windows, batch_size=2)
    jax.effects_barrier()
    assert list(results) == ["near", "far"]
    assert calls == {"reference": 3, "candidate": 6}
    assert results["far"] == compare(apply, make_params(0), make_params(1), windows, batch_size=2)


def test_result_does_not_depend_on_the_batch_size() -> None:
    first, second = (compare(apply, make_params(0), make_params(1), make_windows(), batch_size=b) for b in (2, 7))
    assert first.delta_nll == pytest.approx(second.delta_nll, abs=1e-6)


def test_compiles_once() -> None:
    traces = []

    def traced(variables: dict, tokens: jax.Array) -> jax.Array:
        traces.append(tokens.shape)
        return apply(variables, tokens)

    compare(traced, make_params(0), make_params(1), make_windows(count=7), batch_size=3)
    assert traces == [(3, 8)]


def test_candidate_with_nan_is_broken() -> None:
    params = make_params(1)
    params["kernel"] = params["kernel"].at[0, 0].set(jnp.nan)
    result = compare(apply, make_params(0), params, make_windows())
    assert result.verdict == "broken"
    assert result.same_top1 == 0.0
    assert result.to_dict()["delta_nll"] is None
    assert json.dumps(result.to_dict(), allow_nan=False)


def test_original_with_nan_is_refused() -> None:
    params = make_params(0)
    params["kernel"] = params["kernel"] * jnp.nan
    with pytest.raises(CalibrationError, match=r"original itself .* not finite \(window 0\)"):
        compare(apply, params, make_params(1), make_windows())


def test_masked_vocabulary_does_not_spoil_the_divergence() -> None:
    def masked(variables: dict, tokens: jax.Array) -> jax.Array:
        return apply(variables, tokens).at[..., 0].set(-jnp.inf)

    windows = np.maximum(make_windows(), 1)
    result = compare(masked, make_params(0), make_params(1), windows)
    assert 0 < result.kl_mean < 100


def test_perplexity_agrees_with_numpy() -> None:
    expected = oracle(make_params(0), make_params(0), make_windows())
    seen = []
    result = perplexity(apply, make_params(0), make_windows(), batch_size=3, progress=lambda *done: seen.append(done))
    assert result.perplexity == pytest.approx(expected["perplexity"], rel=1e-6)
    assert (result.windows, result.tokens) == (7, 56)
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert set(result.to_dict()) == {"nll", "perplexity", "windows", "tokens"}


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_empty_evaluation_set_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match="evaluation set is empty: windows have shape"):
        compare(apply, make_params(0), make_params(1), np.zeros(shape, np.int32))


def test_one_window_and_bad_batch_are_errors() -> None:
    with pytest.raises(CalibrationError, match="at least 2 windows, got 1"):
        compare(apply, make_params(0), make_params(1), make_windows(count=1))
    with pytest.raises(ConfigError, match="batch_size=0"):
        perplexity(apply, make_params(0), make_windows(), batch_size=0)


def test_table_and_dictionary_round_trip() -> None:
    result = compare(apply, make_params(0), make_params(1), make_windows(), rule=VerdictRule(margin=0.05))
    text = str(result)
    assert "nats per token, 95% interval [" in text
    assert "7 windows, 56 tokens" in text and "at most 0.05 nats" in text
    assert Comparison.from_dict(json.loads(json.dumps(result.to_dict()))) == result
