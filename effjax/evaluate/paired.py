"""Perplexity of one model, and the paired comparison of compressed models with their original, in one pass."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import CalibrationError, ConfigError
from effjax.evaluate.loss import next_token_nll
from effjax.evaluate.statistics import VerdictRule, paired_bootstrap

PyTree = Any
Apply = Callable[[dict[str, PyTree], jax.Array], jax.Array]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well one model predicts the windows: `perplexity = exp(nll)`, `nll` the mean negative log-likelihood."""

    nll: float
    perplexity: float
    windows: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return _finite(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A compressed model against its original on the same windows.

    Attributes:
        nll: mean negative log-likelihood of the compressed model, nats per token.
        nll_reference: the same of the original.
        delta_nll: `nll - nll_reference`.
        delta_low, delta_high: its interval at `confidence`, bootstrapped over windows.
        perplexity, perplexity_reference: exponentials of the two likelihoods.
        kl_mean, kl_q999: divergence KL(original ‖ compressed) of the next-token distributions, its mean and 99.9 %
            quantile over tokens.
        same_top1: share of tokens whose most probable continuation is the same in both.
        verdict: one of `effjax.evaluate.VERDICTS`, by `rule`.
    """

    nll: float
    nll_reference: float
    delta_nll: float
    delta_low: float
    delta_high: float
    perplexity: float
    perplexity_reference: float
    kl_mean: float
    kl_q999: float
    same_top1: float
    verdict: str
    windows: int
    tokens: int
    rule: VerdictRule
    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the compressed model over that of the original."""
        return math.exp(self.delta_nll) if self.delta_nll < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes None."""
        return _finite(dataclasses.asdict(self) | {"perplexity_ratio": self.perplexity_ratio})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        """The inverse of `to_dict`; None becomes NaN."""
        fields = {f.name: values[f.name] for f in dataclasses.fields(cls)}
        fields = {name: math.nan if value is None else value for name, value in fields.items()}
        return cls(**fields | {"rule": VerdictRule(**fields["rule"])})

    def __str__(self) -> str:
        rows = [
            ("perplexity", f"{self.perplexity_reference:.3f} -> {self.perplexity:.3f} (x {self.perplexity_ratio:.4f})"),
            ("ΔNLL", f"{self.delta_nll:+.4f} nats per token, {self.confidence:.0%} interval {self.interval}"),
            ("KL divergence", f"mean {self.kl_mean:.5f}, 99.9 % quantile {self.kl_q999:.4f}"),
            ("same top-1", f"{self.same_top1:.2%} of tokens"),
            ("measured on", f"{self.windows} windows, {self.tokens} tokens"),
            ("verdict", self.verdict),
            ("rule", str(self.rule)),
        ]
        return "\n".join(f"{name:<14} {value}" for name, value in rows)

    @property
    def interval(self) -> str:
        return f"[{self.delta_low:+.4f}, {self.delta_high:+.4f}]"


def perplexity(
    apply: Apply, params: PyTree, windows: np.ndarray, *, batch_size: int = 8, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of `params` on `windows`; arguments as in `compare_many`."""
    windows = _checked(windows, batch_size)
    logits_of = jax.jit(lambda p, tokens: apply({"params": p}, tokens))
    nll = np.concatenate(
        [
            np.asarray(_nll(logits_of(params, tokens), targets, mask), np.float64)[:rows]
            for tokens, targets, mask, rows in _batches(windows, batch_size, progress)
        ]
    )
    count = int((windows[:, 1:] >= 0).sum())
    mean = float(nll.sum() / count)
    return Perplexity(nll=mean, perplexity=_exp(mean), windows=len(windows), tokens=count)


def compare(apply: Apply, reference: PyTree, candidate: PyTree, windows: np.ndarray, **options: Any) -> Comparison:
    """Compares one compressed model with its original; `options` and errors as in `compare_many`.

    Example:
        >>> apply = lambda variables, tokens: jax.nn.one_hot(tokens, 8) * variables["params"]
        >>> windows = np.tile(np.arange(6, dtype=np.int32), (4, 1))
        >>> compare(apply, 1.0, 1.0, windows).verdict
        'indistinguishable'
    """
    return compare_many(apply, reference, {"": candidate}, windows, **options)[""]


def compare_many(
    apply: Apply,
    reference: PyTree,
    candidates: Mapping[str, PyTree],
    windows: Int[np.ndarray, "windows length"],
    *,
    batch_size: int = 8,
    rule: VerdictRule | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Comparison]:
    """Compares several compressed models with one original, which runs once for all of them.

    A batch at a time: logits of the original, logits of one candidate, then four numbers a token; no logits outlive
    their batch. Original and candidate go through the same function, so parameters that are equal give a difference
    and a divergence of exactly 0.

    Args:
        apply: `apply({"params": params}, tokens) -> logits` float [batch, length, vocab], causal;
            `ej.lift(model.apply)` for compressed leaves.
        reference: parameters of the original.
        candidates: parameters of the compressed models by name.
        windows: int32; every token but the first of each row is predicted from those before it; -1 marks padding at the
            end.
        batch_size: windows that run at once; bounds the memory of the logits.
        rule: what the verdict demands, `VerdictRule()` by default; its `margin` is the non-inferiority margin.
        confidence, resamples, seed: of the bootstrap, see `paired_bootstrap`.
        progress: called with `(windows done, windows in all)` after each batch.

    Returns:
        A `Comparison` for each name, in the order of `candidates`.

    Raises:
        CalibrationError: `windows` is empty, has one row, or holds nothing to predict; the original is not finite.
        ConfigError: `batch_size` below 1.
    """
    rule = VerdictRule() if rule is None else rule
    windows = _checked(windows, batch_size)
    logits_of = jax.jit(lambda p, tokens: apply({"params": p}, tokens))
    reference_nll: list[np.ndarray] = []
    scores: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in candidates}
    for tokens, targets, mask, rows in _batches(windows, batch_size, progress):
        original = logits_of(reference, tokens)
        reference_nll.append(np.asarray(_nll(original, targets, mask), np.float64)[:rows])
        for name, params in candidates.items():
            pair = _pair_scores(original, logits_of(params, tokens), targets, mask)
            scores[name].append(tuple(np.asarray(score)[:rows] for score in pair))
    mask = windows[:, 1:] >= 0
    nll_reference = np.concatenate(reference_nll)
    if not np.isfinite(nll_reference).all():
        window = int(np.argmax(~np.isfinite(nll_reference).all(axis=1)))
        raise CalibrationError(
            f"the original itself predicts with a likelihood that is not finite (window {window}): "
            "a comparison with it means nothing; run `effjax verify` on it"
        )
    results = {}
    for name, parts in scores.items():
        nll, kl, same = (np.concatenate(part) for part in zip(*parts, strict=True))
        per_window = (nll.astype(np.float64) - nll_reference).sum(axis=1)
        counts = mask.sum(axis=1)
        delta = float(per_window.sum() / counts.sum())
        token_kl = kl[mask].astype(np.float64)
        kl_mean = float(token_kl.mean())
        low, high = paired_bootstrap(per_window, counts, confidence=confidence, resamples=resamples, seed=seed)
        mean_reference = float(nll_reference.sum() / counts.sum())
        mean = float(nll.astype(np.float64).sum() / counts.sum())
        results[name] = Comparison(
            nll=mean,
            nll_reference=mean_reference,
            delta_nll=delta,
            delta_low=low,
            delta_high=high,
            perplexity=_exp(mean),
            perplexity_reference=_exp(mean_reference),
            kl_mean=kl_mean,
            kl_q999=float(np.quantile(token_kl, 0.999)),
            same_top1=float(same[mask].mean()),
            verdict=rule(delta, low, high, kl=kl_mean),
            windows=len(windows),
            tokens=int(counts.sum()),
            rule=rule,
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
    return results


def _checked(windows: np.ndarray, batch_size: int) -> np.ndarray:
    windows = np.asarray(windows)
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2 or not (windows[:, 1:] >= 0).any():
        raise CalibrationError(
            f"the evaluation set is empty: windows have shape {windows.shape}; "
            "give at least 2 windows of at least 2 tokens (windows_from_text cuts them from a text)"
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: use at least 1")
    return windows.astype(np.int32)


def _batches(
    windows: np.ndarray, batch_size: int, progress: Progress | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Inputs, targets, mask and valid rows of each batch; all batches have one shape, so that jit compiles once."""
    batch_size = min(batch_size, len(windows))
    for start in range(0, len(windows), batch_size):
        part = windows[start : start + batch_size]
        rows = len(part)
        part = np.pad(part, ((0, batch_size - rows), (0, 0)), constant_values=-1)
        yield np.maximum(part[:, :-1], 0), np.maximum(part[:, 1:], 0), part[:, 1:] >= 0, rows
        if progress is not None:
            progress(start + rows, len(windows))


@jax.jit
def _nll(
    logits: Float[Array, "batch length vocab"], targets: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
) -> Float[Array, "batch length"]:
    return jnp.where(mask, next_token_nll(logits, targets), 0.0)


@jax.jit
def _pair_scores(
    original: Float[Array, "batch length vocab"],
    candidate: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """Per token: NLL of the candidate, KL(original ‖ candidate), and whether both have the same most probable token."""
    log_p = jax.nn.log_softmax(original.astype(jnp.float32))
    log_q = jax.nn.log_softmax(candidate.astype(jnp.float32))
    p = jnp.exp(log_p)
    terms = jnp.where(p > 0, p * (log_p - log_q), 0.0)  # a masked token (-inf in both) adds nothing
    kl = jnp.maximum(jnp.sum(terms, axis=-1), 0.0)  # rounding can leave -1e-8
    same = (jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)) & jnp.isfinite(kl)
    return _nll(candidate, targets, mask), jnp.where(mask, kl, 0.0), same & mask


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
