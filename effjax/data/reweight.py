"""Dynamic loss reweighting: every example of a batch is trained on, and counts by where its loss lies in the batch."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossReweighting:
    """`w_i ~ exp(h(l_i) / temperature)`, the losses brought to [-1, 1] within the batch (Sow et al., ICLR 2025).

    Attributes:
        strategy: `h`: "linear" (low losses count less), "quadratic" (those in the middle count most, outliers little)
            or "extremes" (the ends count most).
        temperature: above 0; high is even weights.

    Example:
        >>> weights = LossReweighting(temperature=1.0)(jnp.array([0.0, 1.0, 4.0]))
        >>> [f"{w:.2f}" for w in weights]
        ['0.30', '0.49', '2.21']
    """

    strategy: Literal["linear", "quadratic", "extremes"] = "linear"
    temperature: float = 1.0

    def __post_init__(self):
        if self.strategy not in ("linear", "quadratic", "extremes"):
            raise ConfigError(f"strategy={self.strategy!r}: choose 'linear', 'quadratic' or 'extremes'")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature}: must be positive")

    def __call__(self, losses: Float[Array, " batch"]) -> Float[Array, " batch"]:
        """Weights of mean 1, without a gradient."""
        losses = jax.lax.stop_gradient(losses.astype(jnp.float32))
        low, high = losses.min(), losses.max()
        scaled = 2 * (losses - low) / jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny) - 1
        height = {"linear": scaled, "quadratic": 1 - scaled**2, "extremes": jnp.abs(scaled)}[self.strategy]
        return losses.shape[0] * jax.nn.softmax(jnp.where(high > low, height, 0.0) / self.temperature)
