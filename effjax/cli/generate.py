"""`effjax generate`: continue a text."""

import dataclasses

from effjax.cli.inputs import ModelName, open_model


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

    def run(self) -> int:
        from effjax.compress import Sampling, runnable_params, write_sample

        model = open_model(self.model).model
        sampling = Sampling(
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )
        print(self.prompt + write_sample(model, runnable_params(model.params), sampling))
        return 0
