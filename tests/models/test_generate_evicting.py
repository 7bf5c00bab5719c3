"""Generation within a budget: against a cache that is never moved, rows alone, memory, bytes, and bad arguments."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.kv import H2O, TOVA, PyramidKV, Scissorhands, SinkWindow
from effjax.kv.importance import ATTENTION_RECEIVED
from effjax.models.compiled_generate import compile_generate
from effjax.models.decoder import Decoder, DecoderApply, new_cache, stack_layers
from effjax.models.generate import generate
from effjax.models.generate_evicting import new_evicting_cache
from tests.models.small import SMALL

CONFIG = SMALL
APPLY = DecoderApply(CONFIG)
STEP = jax.jit(APPLY, static_argnames="last_only")
PROMPTS = np.random.Generator(np.random.PCG64(7)).integers(0, 40, (2, 14), np.int32)
LENGTHS = np.array([14, 9], np.int32)
NEW, CHUNK = 9, 4


@pytest.fixture(scope="module")
def params():
    tree = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), jnp.asarray(PROMPTS))["params"]
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, tree)


def run(params, kv, prompts=PROMPTS, lengths=LENGTHS, *, chunk=CHUNK, new=NEW, config=CONFIG, cache=None, **options):
    apply = DecoderApply(config)
    if cache is None:
        cache = new_evicting_cache(config, kv, prompts=prompts.shape, max_new_tokens=new, prefill_chunk=chunk)
    tokens, counts = generate(
        apply, params, cache, jnp.asarray(prompts), jnp.asarray(lengths), max_new_tokens=new, kv=kv,
        prefill_chunk=chunk, **options,
    )  # fmt: skip
    return np.asarray(tokens), np.asarray(counts)


class NeverMoved:
    """One row in a cache with a slot for every token, where evicted tokens are hidden: positions of -1 are not seen.

    What is kept is chosen with lists, from the scores of the tokens that are still seen.
    """

    def __init__(self, params, rank, importance):
        self.params, self.rank = params, rank
        self.cache = new_cache(CONFIG, batch=1, slots=24, importance=importance)
        self.hidden = np.zeros(self.cache.positions.shape, bool)

    def read(self, tokens):
        padded = np.zeros((1, CHUNK), np.int32)
        padded[0, : len(tokens)] = tokens
        positions = jnp.where(self.hidden, -1, self.cache.positions)
        scores = jnp.where(self.hidden, 0.0, self.cache.scores)
        logits, self.cache = STEP(
            {"params": self.params}, padded, cache=self.cache.replace(positions=positions, scores=scores),
            lengths=jnp.array([len(tokens)]), last_only=True,
        )  # fmt: skip
        return np.asarray(logits[0, 0])

    def live(self, layer):
        """Slots of every head of a layer that are seen, in the order of their tokens, and their scores."""
        count = int(self.cache.length[layer, 0, 0])
        slots = [np.flatnonzero(~self.hidden[layer, 0, head, :count]) for head in range(2)]
        return slots, [np.asarray(self.cache.scores)[layer, 0, head][at] for head, at in enumerate(slots)]

    def evict(self, layer, budget):
        slots, scores = self.live(layer)
        for head, kept in enumerate(self.rank(scores, budget)):
            self.hidden[layer, 0, head, np.setdiff1d(slots[head], slots[head][kept])] = True


def best(newest):
    def rank(scores, budget):
        kept = []
        for row in scores:
            count, always = len(row), newest(budget)
            order = sorted(range(count), key=lambda i: (i < count - always, -row[i], -i))
            kept.append(sorted(order[:budget]))
        return kept

    return rank


def tova(scores, budget):
    total = np.sum(scores, axis=0)
    order = sorted(range(len(total)), key=lambda i: (i < len(total) - 1, -total[i], -i))
    return [sorted(order[:budget])] * 2


def snap(scores, budget, window=2):
    kept = []
    for row in scores:
        before = np.concatenate([[0], row[: len(row) - window], np.zeros(window + 1)])
        near = [before[i : i + 3].sum() for i in range(len(row))]
        order = sorted(range(len(row)), key=lambda i: (i < len(row) - window, -near[i], -i))
        kept.append(sorted(order[:budget]))
    return kept


def first_and_last(scores, budget):
    return [list(range(len(row))) if len(row) <= budget else [0, *range(len(row) - budget + 1, len(row))]
            for row in scores]  # fmt: skip


CASES = {
    "H2O": (H2O(budget=7, drop=2), best(lambda budget: budget // 2), (7, 7)),
    "Scissorhands": (Scissorhands(budget=(5, 9), recent=2, quantile=0.6, drop=2), best(lambda _: 2), (5, 9)),
    "TOVA": (TOVA(budget=6), tova, (6, 6)),
    "PyramidKV": (PyramidKV(budget=6, window=2, kernel=3, beta=2, drop=1), snap, (8, 4)),
    "SinkWindow": (SinkWindow(sinks=1, window=5), first_and_last, (6, 6)),
}


@pytest.mark.parametrize(("method", "rank", "budgets"), CASES.values(), ids=CASES.keys())
def test_equals_a_cache_that_is_never_moved(params, method, rank, budgets):
    """Prompts by chunks, then single tokens: the same tokens as where what is evicted is only hidden."""
    tokens, counts = run(params, method)
    assert counts.tolist() == [NEW] * 2
    for row, length in enumerate(LENGTHS):
        text, oracle = PROMPTS[row, :length].tolist(), NeverMoved(params, rank, method.importance or ATTENTION_RECEIVED)
        cuts = [max(0, length - CHUNK * i) for i in range(math.ceil(14 / CHUNK), -1, -1)]
        for begin, end in zip(cuts, cuts[1:], strict=False):
            if begin == end:
                continue
            logits = oracle.read(text[begin:end])
            for layer in range(2):
                if len(oracle.live(layer)[0][0]) > budgets[layer]:
                    oracle.evict(layer, budgets[layer])
        for step in range(NEW):
            assert tokens[row, step] == np.argmax(logits), (row, step)
            for layer in range(2):
                slots = budgets[layer]
                if len(oracle.live(layer)[0][0]) >= slots:
                    oracle.evict(layer, slots - (getattr(method, "drop", None) or 1))
            logits = oracle.read([int(tokens[row, step])])


def test_rows_alone_equal_rows_together(params):
    method = CASES["H2O"][0]
    together, _ = run(params, method)
    alone, _ = run(params, method, PROMPTS[1:, : LENGTHS[1]], LENGTHS[1:])
    np.testing.assert_array_equal(alone[0], together[1])


def test_whole_and_split_caches_agree(params):
    scanned = dataclasses.replace(CONFIG, scan_layers=True)
    method = CASES["TOVA"][0]
    np.testing.assert_array_equal(run(stack_layers(params), method, config=scanned)[0], run(params, method)[0])


def test_a_budget_for_all_changes_no_token(params):
    plain = new_cache(CONFIG, batch=2, slots=24, split=True)
    expected, _ = generate(APPLY, params, plain, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), max_new_tokens=NEW)
    np.testing.assert_array_equal(run(params, H2O(budget=23), chunk=5)[0], expected)
    assert (run(params, CASES["H2O"][0])[0] != expected).any(), "the evicted tokens did matter"


def test_the_cache_while_decoding_is_the_budget(params):
    """Bytes of the cache that steps read, to the byte, layers of different sizes."""
    shape = {"prompts": (2, 14), "max_new_tokens": NEW, "prefill_chunk": CHUNK}
    assert new_evicting_cache(CONFIG, H2O(budget=0.25), **shape).layer_slots == (6 + CHUNK, 6 + CHUNK)
    method, _, slots = CASES["PyramidKV"]
    cache = new_evicting_cache(CONFIG, method, **shape)
    assert cache.layer_slots == tuple(count + CHUNK for count in slots)
    options = {"max_new_tokens": NEW, "kv": method, "prefill_chunk": CHUNK}
    tokens, _, stats = compile_generate(APPLY, params, cache, PROMPTS, LENGTHS, **options).run(
        params, cache, PROMPTS, LENGTHS
    )
    np.testing.assert_array_equal(tokens, run(params, method)[0])
    assert stats.cache_slots == slots
    heads = 2 * 2 * 2
    assert stats.cache_bytes == 2 * 2 * sum(slots) * (2 * 8 * 4 + 4 + 4) + heads * 4 + 2 * 4
    assert stats.full_cache_bytes == new_cache(CONFIG, batch=2, slots=14 + NEW).nbytes


def test_memory_falls_with_the_budget(params):
    """Of both programs: arguments and outputs are the budget's, and temporaries grow with it, not with the text."""
    length = 4096
    shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, length), (1,))]

    def programs(cache, **options):
        return compile_generate(APPLY, params, cache, *shapes, max_new_tokens=32, **options)

    plain = programs(jax.eval_shape(lambda: new_cache(CONFIG, batch=1, slots=length + 32, split=True)))
    method, chunk = H2O(budget=256), 64
    shape = {"prompts": (1, length), "max_new_tokens": 32, "prefill_chunk": chunk}
    cache = jax.eval_shape(lambda: new_evicting_cache(CONFIG, method, **shape))
    within = programs(cache, kv=method, prefill_chunk=chunk)

    def peak(program):
        memory = program.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return held + memory.temp_size_in_bytes

    assert within.prefill.memory_analysis().alias_size_in_bytes >= cache.nbytes, "the cache stays in place"
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert peak(within.decode) - weights < (peak(plain.decode) - weights) / 4
    assert peak(within.prefill) - weights < (peak(plain.prefill) - weights) / 4


def test_one_program_for_all_chunks_and_one_for_steps(params):
    lengths = []

    def apply(variables, tokens, **kwargs):
        lengths.append(tokens.shape[1])
        return APPLY(variables, tokens, **kwargs)

    method = H2O(budget=6)
    cache = new_evicting_cache(CONFIG, method, prompts=PROMPTS.shape, max_new_tokens=NEW, prefill_chunk=CHUNK)
    options = {"max_new_tokens": NEW, "kv": method, "prefill_chunk": CHUNK}
    for prompts in (PROMPTS, PROMPTS[::-1].copy()):
        generate(apply, params, cache, jnp.asarray(prompts), jnp.asarray(LENGTHS), **options)
    assert sorted(lengths) == [1, CHUNK, CHUNK], "the first chunks are one loop, the last one gives the logits"
    generate(apply, params, cache, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), donate_cache=True, **options)
    assert all(array.is_deleted() for array in (*cache.k, *cache.v, cache.positions, cache.scores))


@pytest.mark.parametrize(
    ("kv", "options", "message"),
    [
        (None, {"chunk": 4}, r"prefill_chunk needs a method that evicts, as kv=ej.kv.H2O\(budget=0.2\)"),
        (H2O(budget=6), {"chunk": 0}, "prefill_chunk must be a whole number of at least 1, found 0"),
        (H2O(budget=6), {"slots": 9}, "layer 0 of the cache has 9 slots, but the budget and a chunk of 4 .* need 10"),
        (TOVA(budget=6), {"slots": 16}, r"generate: TOVA ranks tokens by .*window=1, .*\), but the scores"),
        (Scissorhands(budget=12, drop=5), {}, "a row of 12 slots that loses 5 at once keeps 7, but 11 must stay"),
        (Scissorhands(budget=0.2), {}, "a budget of 5 tokens leaves nothing besides the newest 10"),
        (H2O(budget=(6, 6, 6)), {}, r"the budget \(6, 6, 6\) has 3 numbers but the cache 2 layers"),
    ],
)
def test_refused(params, kv, options, message):
    chunk = options.get("chunk", CHUNK)
    cache = new_cache(CONFIG, batch=2, slots=options["slots"], split=True) if "slots" in options else None
    if kv is None:
        cache = new_cache(CONFIG, batch=2, slots=24)
    with pytest.raises(ConfigError, match=message):
        run(params, kv, cache=cache, chunk=chunk)


def test_a_filled_cache_and_a_scanned_model_are_refused(params):
    method = H2O(budget=6)
    _, filled = STEP({"params": params}, PROMPTS[:, :2], cache=new_cache(CONFIG, batch=2, slots=24))
    with pytest.raises(ConfigError, match="with kv the cache must be empty, found 2 tokens in it"):
        run(params, method, cache=filled)
    scanned = dataclasses.replace(CONFIG, scan_layers=True)
    with pytest.raises(ConfigError, match=r"layers keep \(8, 4\) tokens, but this model scans .*unroll it"):
        run(params, CASES["PyramidKV"][0], config=scanned)
