"""`effjax generate`: continue a text, and say what it took."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from effjax.cli.console import say
from effjax.cli.inputs import CalibratingKV, ModelName, OptionalInt, OptionalName, open_model
from effjax.errors import ConfigError

if TYPE_CHECKING:
    from effjax.models.compiled_generate import GenerationStats
    from effjax.models.hf import LoadedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continues a text with a dense or compressed model."""

    model: ModelName = "default"
    """Directory (dense or compressed), hub id, or "default"."""
    prompt: str = "Return a"
    """The text to continue."""
    max_new_tokens: int = 100
    """The most tokens to write."""
    temperature: float = 0.7
    """0 takes the likeliest token; higher is more varied."""
    top_p: float = 0.95
    """Draws only from the likeliest tokens that together hold this probability."""
    seed: int = 0
    """Of the draws."""
    batch: int = 1
    """Continuations that are written at once, each with draws of its own; the first is that of a batch of one."""
    packed: bool = False
    """Runs compressed weights packed however small the model is. Without it those of a model whose float32 weights fit
    in 128 MiB are unpacked first."""
    kv: Literal["scissorhands", "h2o", "snapkv", "pyramidkv", "tova", "streamingllm"] | None = None
    """Evicts from the key-value cache by this method."""
    kv_budget: float = 0.2
    """Tokens that a head of the cache keeps: a share (below 1) of prompt and new tokens, or a whole number."""
    kv_code: OptionalName = None
    """Holds the cache as codes: cq1, cq2, cq4 (coupled channels, so many bits each), cq-8c8b and the like, kvquant1 to
    kvquant8, int1 to int8; or keys alone, looked up: nomad1, nomad2, nomad4. Learned from the calibration text; or a
    file that `effjax calibrate-kv` wrote. kivi1 to kivi8 learn nothing."""
    prefill_chunk: OptionalInt = None
    """Prompt tokens that run at once, with --kv, which evicts behind each chunk. Without it the prompt is one chunk."""
    draft: OptionalName = None
    """A smaller or more compressed model with the same tokenizer: it writes ahead, and the model checks."""
    draft_tokens: int = 4
    """That --draft writes before each check."""
    stats: bool = False
    """Prints tokens a second, the time to the first token, the bytes of weights and cache a token, and what --kv and
    --kv-code left of the cache (on stderr)."""
    calibrating: CalibratingKV = dataclasses.field(default_factory=CalibratingKV)

    def run(self) -> int:
        from effjax.cli.kv import coders, eviction_method
        from effjax.models.compiled_generate import generate_text_measured
        from effjax.models.generate import generate_text

        if self.batch < 1:
            raise ConfigError(f"--batch {self.batch}: at least one continuation")
        if self.draft is not None:
            return self._speculate(self.draft)
        model = open_model(self.model).model
        learned = None if self.kv_code is None else coders(self.kv_code, model, self.calibrating)
        model, apply = runnable(model, packed=self.packed)
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "apply": apply,
            "kv": None if self.kv is None else eviction_method(self.kv, self.kv_budget),
            "prefill_chunk": self.prefill_chunk,
            "coders": learned,
        }
        prompts = [self.prompt] * self.batch
        if self.stats:
            texts, stats = generate_text_measured(model, prompts, **options)
        else:
            texts, stats = generate_text(model, prompts, **options), None
        for text in texts:
            print(self.prompt + text)
        if stats is not None:
            say(describe(stats))
        return 0

    def _speculate(self, name: str) -> int:
        from effjax.models.speculative import generate_text_speculative

        if self.kv is not None or self.kv_code is not None:
            raise ConfigError("--draft: tokens cannot be taken back from an evicted or coded cache; leave --kv out")
        model, apply = runnable(open_model(self.model).model, packed=self.packed)
        draft, draft_apply = runnable(open_model(name).model, packed=self.packed)
        texts, found = generate_text_speculative(
            model,
            draft,
            [self.prompt] * self.batch,
            draft_tokens=self.draft_tokens,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            apply=apply,
            draft_apply=draft_apply,
        )
        for text in texts:
            print(self.prompt + text)
        if self.stats:
            tokens, passes = int(found.counts.sum()), int(found.passes.sum())
            say(f"speculation: {tokens:,} tokens in {passes:,} passes of the model ({tokens / passes:.2f} a pass)")
        return 0


def runnable(model: "LoadedModel", *, packed: bool) -> tuple["LoadedModel", Any]:
    """A model as this platform runs it fastest, and its `apply`."""
    import jax

    from effjax.compress import float32_apply, runnable_params
    from effjax.prepare import can_prepare, prepare

    apply = float32_apply(model)
    params = model.params if packed else runnable_params(model.params)
    if jax.default_backend() == "cpu" and can_prepare(params):
        params = prepare(params)
    return dataclasses.replace(model, config=apply.decoder.config, params=params), apply


def describe(stats: "GenerationStats") -> str:
    """The figures of a run: two to four lines.

    Example:
        >>> from effjax.models.compiled_generate import GenerationStats
        >>> print(describe(GenerationStats(rows=1, prompt_tokens=5, new_tokens=11, steps=10, first_token_s=0.5,
        ...                                decode_s=2.0, weight_bytes=900, cache_bytes=100)))
        first token: 500.0 ms (5 prompt tokens, 10.0 a second)
        decoding: 5.0 tokens a second (10 steps of 200.00 ms)
        bytes a token: 1,000 (weights 900, cache 100 a step), 0.00 GB/s
    """
    lines = [
        f"first token: {1e3 * stats.first_token_s:.1f} ms ({stats.prompt_tokens:,} prompt tokens, "
        f"{stats.prompt_tokens_per_second:.1f} a second)"
    ]
    speed = ""
    if stats.tokens_per_second is not None and stats.bytes_per_second is not None:
        step = 1e3 * stats.decode_s / stats.steps
        lines.append(
            f"decoding: {stats.tokens_per_second:.1f} tokens a second ({stats.steps:,} steps of {step:.2f} ms)"
        )
        speed = f", {stats.bytes_per_second / 1e9:.2f} GB/s"
    lines.append(
        f"bytes a token: {stats.bytes_per_token:,.0f} (weights {stats.weight_bytes:,}, cache {stats.cache_bytes:,} "
        f"a step){speed}"
    )
    if stats.full_cache_bytes is not None:
        few, most = min(stats.cache_slots), max(stats.cache_slots)
        lines.append(
            f"cache: {most if few == most else f'{few} to {most}'} slots a head, {stats.cache_bytes:,} bytes of the "
            f"{stats.full_cache_bytes:,} of all tokens ({100 * stats.cache_bytes / stats.full_cache_bytes:.1f} %)"
        )
    return "\n".join(lines)
