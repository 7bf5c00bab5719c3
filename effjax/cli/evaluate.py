"""`effjax eval`: perplexity, and the paired comparison with the original."""

import dataclasses
from typing import Annotated, Literal

import tyro

from effjax.cli.console import progress
from effjax.cli.inputs import Judging, ModelName, OptionalModel, Switch, open_model, open_original, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Judges a model: the perplexity of a dense one, the paired comparison of a compressed one with its original."""

    model: ModelName = "default"
    """Directory (dense or compressed), hub id, or "default"."""
    original: OptionalModel = None
    """What a compressed model was made from, where its recipe does not say."""
    require: Annotated[
        Literal["indistinguishable", "slightly worse", "inconclusive", "worse", "broken"] | None,
        tyro.conf.arg(metavar="VERDICT", help_behavior_hint=""),
    ] = None
    """Exit code 1 when the verdict is worse than this one (indistinguishable, slightly worse, ...)."""
    json: Switch = False
    """Prints JSON."""
    judging: Judging = dataclasses.field(default_factory=Judging)

    def run(self) -> int:
        from effjax.compress import float32_apply, runnable_params
        from effjax.errors import ConfigError
        from effjax.evaluate import compare, perplexity
        from effjax.evaluate.statistics import at_most

        opened = open_model(self.model)
        compressed = opened.recipe is not None or self.original is not None
        if self.require and not compressed:
            raise ConfigError(
                f"--require compares with an original, but {opened.name} is dense: name one with --original"
            )
        original = open_original(opened, self.original) if compressed else opened
        windows = self.judging.cut(original.model)
        apply = float32_apply(original.model)
        with progress() as report:

            def step(done: int, total: int) -> None:
                report("evaluate", done, total)

            options = {"batch_size": self.judging.batch_size, "progress": step}
            params = runnable_params(opened.model.params)
            if not compressed:
                found = perplexity(apply, params, windows, **options)
                text = f"perplexity {found.perplexity:.3f} ({found.nll:.4f} nats per token)"
                print(
                    to_json(found.to_dict()) if self.json else f"{text}\n{found.windows} windows, {found.tokens} tokens"
                )
                return 0
            same_tensors(opened, original)
            dense = runnable_params(original.model.params)
            result = compare(apply, dense, params, windows, rule=self.judging.rule(), seed=self.judging.seed, **options)
        if self.json:
            print(to_json(result.to_dict()), end="")
        else:
            print(result)
        return 0 if self.require is None or at_most(result.verdict, self.require) else 1


def same_tensors(opened, original) -> None:
    """Refuses a pair of models that are not forms of one."""
    from effjax.compress import check_same_tensors

    check_same_tensors(original.model.params, opened.model.params)
