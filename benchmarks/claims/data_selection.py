"""Claims of choosing examples before and while one trains: EL2N, GraNd, prototypes, SeTa and DSIR beside random choice.

    python -m benchmarks.claims.data_selection --data DIR [--seeds 0 1 2] [--parts images text]

Every arm of a comparison takes as many steps of as many examples; scores come from training that is not counted, as in
their papers.

- images: DIR/images/mnist, 12,000 images (500 where they are scarce), a network 784-256-10. EL2N (Paul et al., NeurIPS
  2021) and GraNd (the same) from four networks trained for two epochs; distances from prototypes (Sorscher et al.,
  NeurIPS 2022) in the logits of one of them; SeTa (Zhou et al., CVPR 2025).
- text: DIR/text and the documentation that Python carries. A pool of passages of four sources in equal parts, of which
  DSIR (Xie et al., NeurIPS 2023) keeps an eighth that looks like 100 passages of one of them; a decoder of two layers
  trains on what was kept and is judged on other passages of that source.

Rates of learning and numbers of steps were chosen on seed 100, by uniform sampling alone.
"""

import argparse
import dataclasses
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from benchmarks.mnist import read_mnist
from effjax.data import (
    DSIR,
    Sampled,
    SeTa,
    Spec,
    Uniform,
    el2n,
    grand,
    kept_by_score,
    prototype_distances,
    python_docs,
    sampled_step,
)
from effjax.distill import apply_mlp, init_mlp
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from train.lm import encode_documents, train_tokenizer

Examples = tuple[jax.Array, jax.Array]
Rows = dict[str, list[float]]

MANY, SCARCE = 12_000, 500
BATCH, STEPS, SCOUTS = 64, 1500, 4
KEEP = 0.5


def fitted(
    losses: Any, optimizer: Any, sampler: Any, params: Any, examples: Any, *, steps: int, batch: int, seed: int
) -> Any:
    """Parameters after so many steps, in one program."""
    n = len(jax.tree.leaves(examples)[0])
    step = sampled_step(sampler, losses, optimizer, batch)
    keys = jax.random.split(jax.random.key(seed), steps)
    run = Sampled.start(params, optimizer, sampler.init(n, Spec(seed=seed)))
    return _all_steps(step, run, keys, examples).params


@partial(jax.jit, static_argnums=0)
def _all_steps(step: Any, run: Sampled, keys: jax.Array, examples: Any) -> Sampled:
    return jax.lax.scan(lambda run, key: (step(run, key, examples)[0], None), run, keys)[0]


# Images ---------------------------------------------------------------------------------------------------------------


def image_losses(params: Any, examples: Examples) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(apply_mlp(params, examples[0]), examples[1])


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Examples of one seed, and those to judge on."""

    examples: Examples
    test: Examples
    seed: int

    def accuracy(self, kept: Any, *, sampler: Any = None, steps: int = STEPS) -> float:
        """In percent, after training on these examples; the first weights are the same for all arms."""
        sampler = Uniform() if sampler is None else sampler
        examples = self.examples if kept is None else tuple(x[kept] for x in self.examples)
        params = fitted(
            image_losses,
            optax.adam(optax.cosine_decay_schedule(1e-3, steps)),
            sampler,
            init_mlp(jax.random.key(self.seed), widths=(784, 256, 10)),
            examples,
            steps=steps,
            batch=BATCH,
            seed=self.seed,
        )
        return 100 * float((apply_mlp(params, self.test[0]).argmax(-1) == self.test[1]).mean())

    def scores(self) -> dict[str, jax.Array]:
        """EL2N and GraNd in the mean of networks trained for two epochs; distances by the first of them."""
        found: dict[str, list[jax.Array]] = {"EL2N": [], "GraNd": [], "prototypes": []}
        for i in range(SCOUTS):
            seed = 1000 + SCOUTS * self.seed + i
            n = len(self.examples[1])
            params = fitted(
                image_losses,
                optax.adam(1e-3),
                Uniform(),
                init_mlp(jax.random.key(seed), widths=(784, 256, 10)),
                self.examples,
                steps=2 * n // BATCH,
                batch=BATCH,
                seed=seed,
            )
            logits = apply_mlp(params, self.examples[0])
            found["EL2N"].append(el2n(logits, self.examples[1]))
            found["GraNd"].append(_gradients(params, self.examples))
            if i == 0:
                found["prototypes"].append(prototype_distances(logits, 10, key=jax.random.key(seed)))
        return {name: jnp.stack(each).mean(0) for name, each in found.items()}


@jax.jit
def _gradients(params: Any, examples: Examples) -> jax.Array:
    def loss(params: Any, example: Any) -> jax.Array:
        return image_losses(params, jax.tree.map(lambda x: x[None], example))[0]

    return grand(loss, params, examples)


def image_sets(data: Path, count: int, seed: int) -> Images:
    (x, y), test = [(p[0].astype(np.float32) / 255, p[1].astype(np.int32)) for p in read_mnist(data)]
    picked = np.random.default_rng(seed).permutation(len(y))[:count]
    return Images((jnp.asarray(x[picked]), jnp.asarray(y[picked])), (jnp.asarray(test[0]), jnp.asarray(test[1])), seed)


def images(data: Path, seeds: tuple[int, ...]) -> tuple[Rows, dict[str, Bar]]:
    rows: Rows = {}
    for seed in seeds:
        many, scarce = (image_sets(data, count, seed) for count in (MANY, SCARCE))
        some = jnp.asarray(np.random.default_rng((seed, 2)).permutation(MANY)[: round(KEEP * MANY)])
        few = jnp.asarray(np.random.default_rng((seed, 3)).permutation(SCARCE)[: round(KEEP * SCARCE)])
        epochs = round(STEPS * BATCH / (0.45 * MANY))
        seta = SeTa(epochs=epochs, annealing=max(1, epochs // 10))
        found = {
            "all examples": many.accuracy(None),
            "half, random": many.accuracy(some),
            "SeTa": many.accuracy(None, sampler=seta),
            "all examples, twice the steps": many.accuracy(None, steps=2 * STEPS),
            "scarce: all examples": scarce.accuracy(None),
            "scarce: half, random": scarce.accuracy(few),
        }
        for name, scores in many.scores().items():
            found[f"half, {name}"] = many.accuracy(kept_by_score(scores, KEEP))
        distances = scarce.scores()["prototypes"]
        for name, easiest in (("hardest", False), ("easiest", True)):
            found[f"scarce: half, prototypes, {name}"] = scarce.accuracy(
                kept_by_score(distances, KEEP, easiest=easiest)
            )
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
        print(f"images, seed {seed}: done", file=sys.stderr, flush=True)

    def less(one: str, other: str) -> float:
        return statistics.mean(a - b for a, b in zip(rows[one], rows[other], strict=True))

    bars = {
        "EL2N's half less a random half, points": Bar(less("half, EL2N", "half, random"), low=0),
        "EL2N's half less all examples, points": Bar(
            less("half, EL2N", "all examples"), low=-0.3, paper="no loss at half of CIFAR-10"
        ),
        "GraNd's half less a random half, points": Bar(less("half, GraNd", "half, random"), low=0),
        "the half far from prototypes less a random half, points": Bar(less("half, prototypes", "half, random"), low=0),
        "scarce: the half near prototypes less the far half, points": Bar(
            less("scarce: half, prototypes, easiest", "scarce: half, prototypes, hardest"), low=0
        ),
        "SeTa less uniform sampling, points": Bar(less("SeTa", "all examples"), low=0),
        "SeTa less uniform sampling of twice the steps, points": Bar(
            less("SeTa", "all examples, twice the steps"), low=-0.3, paper="no loss at half of the cost"
        ),
    }
    return rows, bars


# Text -----------------------------------------------------------------------------------------------------------------

# Characters of a passage; passages of a source to choose from, to look like, and to judge on.
PASSAGE, EACH, TARGET, JUDGED = 400, 1600, 100, 200
VOCAB, WINDOW, TEXT_STEPS, TEXT_BATCH = 512, 64, 300, 16


def sources(data: Path) -> dict[str, list[str]]:
    """Passages of each source."""

    def read(name: str) -> str:
        return (data / "text" / name).read_text(encoding="utf-8")

    texts = {
        "Wikipedia": read("wikitext-2/valid.txt"),
        "Shakespeare": read("tiny_shakespeare/input.txt"),
        "stories": read("tinystories_sample/tinystories_sample.txt").replace("<|endoftext|>", "\n"),
        "documentation": "\n".join(python_docs.documents("train")),
    }
    return {
        name: [text[i : i + PASSAGE] for i in range(0, len(text) - PASSAGE, PASSAGE)] for name, text in texts.items()
    }


def decoder() -> Decoder:
    return Decoder(
        DecoderConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=WINDOW,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    )


MODEL = decoder()


def text_losses(params: Any, windows: jax.Array) -> jax.Array:
    logits = jnp.asarray(MODEL.apply({"params": params}, windows[:, :-1]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(-1)


def text(data: Path, seeds: tuple[int, ...]) -> tuple[Rows, dict[str, Bar]]:
    rows: Rows = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        drawn = {
            name: [passages[i] for i in rng.permutation(len(passages))] for name, passages in sources(data).items()
        }
        wanted = list(drawn)[seed % len(drawn)]
        pool = [(name, passage) for name, passages in drawn.items() for passage in passages[:EACH]]
        held = drawn[wanted][EACH:]
        target, judged = held[:TARGET], held[TARGET : TARGET + JUDGED]
        tokenizer = train_tokenizer([passage for _, passage in pool], VOCAB)

        def windows(texts: list[str], tokenizer: Any = tokenizer) -> np.ndarray:
            return python_docs.windows(encode_documents(tokenizer, texts), WINDOW)[0][:-1]

        count = len(pool) // 8
        method = DSIR()
        weights = method.log_weights([passage for _, passage in pool], target)
        chosen = {
            "random": rng.permutation(len(pool))[:count],
            "DSIR": method.select(weights, count, seed=seed),
            "of the source itself": rng.permutation(np.flatnonzero([name == wanted for name, _ in pool]))[:count],
        }
        start = jax.jit(MODEL.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
        tests = jnp.asarray(windows(judged))
        kept = {arm: windows([pool[i][1] for i in ids]) for arm, ids in chosen.items()}
        least = min(map(len, kept.values()))  # equal tokens for all arms
        for arm, ids in chosen.items():
            params = fitted(
                text_losses,
                optax.adam(optax.cosine_decay_schedule(3e-3, TEXT_STEPS)),
                Uniform(),
                start,
                jnp.asarray(rng.permutation(kept[arm])[:least]),
                steps=TEXT_STEPS,
                batch=TEXT_BATCH,
                seed=seed,
            )
            rows.setdefault(f"loss, {arm}", []).append(float(text_losses(params, tests).mean()))
            share = 100 * statistics.mean(pool[i][0] == wanted for i in ids)
            rows.setdefault(f"% of the source, {arm}", []).append(share)
        print(f"text, seed {seed}: {wanted}", file=sys.stderr, flush=True)
    gaps = [(r - d) / (r - s) for r, d, s in zip(*(rows[f"loss, {arm}"] for arm in chosen), strict=True)]
    gained = [r - d for r, d in zip(rows["loss, random"], rows["loss, DSIR"], strict=True)]
    bars = {
        "DSIR: loss less than that of random choice, least of the seeds, nats": Bar(min(gained), low=0),
        "DSIR: share of the way from random choice to the source itself": Bar(statistics.mean(gaps), low=0.5),
        "DSIR: share of the source in what it keeps, over that in the pool": Bar(
            statistics.mean(rows["% of the source, DSIR"]) / 25, low=2
        ),
    }
    return rows, bars


def show(title: str, rows: Rows) -> None:
    table = Table(title=title)
    for column in ("arm", "mean", "each seed"):
        table.add_column(column)
    for name, values in rows.items():
        table.add_row(name, f"{statistics.mean(values):.3f}", " ".join(f"{value:.2f}" for value in values))
    Console(width=120).print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.data_selection", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory that holds images/mnist and text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=("images", "text"), default=["images", "text"])
    args = parser.parse_args(argv)
    bars: dict[str, Bar] = {}
    extra: dict[str, Any] = {}
    for part, run in (("images", images), ("text", text)):
        if part in args.parts:
            rows, found = run(args.data, tuple(args.seeds))
            show(f"{part}, {len(args.seeds)} seeds", rows)
            bars |= found
            extra[part] = rows
    return conclude("data_selection", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
