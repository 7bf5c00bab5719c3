"""Multi-scale batches: an image size drawn every step, and as many images of that size as cost the same.

After the variably-sized batch samplers of CVNets (Mehta, Abdolhosseini and Rastegari, 2022) and MobileViT (Mehta and
Rastegari, ICLR 2022): one size and one batch (SSc-FBS), many sizes and one batch (MSc-FBS), many sizes and a batch that
grows as images shrink (MSc-VBS), and a range of sizes that grows in training. A plan is a pure function of seed and
epoch, with few different shapes, so that each is compiled once.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32

from effjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """Images a step: `[batch, height, width]`."""

    height: int
    width: int
    batch: int

    @property
    def pixels(self) -> int:
        """Of all images of the step, what a convolutional network's operations and memory are proportional to."""
        return self.height * self.width * self.batch


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """A step: its shape, and the examples `int32[batch]` to bring to it."""

    shape: Shape
    ids: Int32[np.ndarray, " batch"]


def divisible(size: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `size`, at least `divisor` and never below nine tenths of `size`.

    Example:
        >>> [divisible(size, 32) for size in (128, 175, 40, 46)]
        [128, 160, 64, 64]
    """
    rounded = max(divisor, int(size + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * size else rounded + divisor


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiScale:
    """Which sizes and batches a training run draws from.

    Attributes:
        kind: "ssc_fbs" (the base size alone), "msc_fbs" (many sizes, the base batch) or "msc_vbs" (many sizes, batches
            of about the same pixels).
        base: height and width that the network is judged at.
        batch: images a step at the base size, over all devices.
        low, high: smallest and largest height; widths keep the base's proportion.
        scales: sizes between them, the base one is added: at most one more shape than this.
        divisor: of heights and widths: the stride of the network.
        devices: that share a batch; every batch is a multiple, so that no shape is padded or split unevenly.

    Raises:
        ConfigError: a setting that cannot work.

    Example:
        >>> sampler = MultiScale(kind="msc_vbs", base=(224, 224), batch=256, low=128, high=320, divisor=32)
        >>> [(shape.height, shape.batch) for shape in sampler.table()]
        [(128, 784), (192, 348), (224, 256), (288, 154), (320, 125)]
    """

    kind: Literal["ssc_fbs", "msc_fbs", "msc_vbs"] = "msc_vbs"
    base: tuple[int, int] = (224, 224)
    batch: int = 256
    low: int = 128
    high: int = 320
    scales: int = 5
    divisor: int = 32
    devices: int = 1

    def __post_init__(self):
        if self.kind not in ("ssc_fbs", "msc_fbs", "msc_vbs"):
            raise ConfigError(f"kind={self.kind!r}: choose 'ssc_fbs', 'msc_fbs' or 'msc_vbs'")
        if min(*self.base, self.batch, self.low, self.scales, self.divisor, self.devices) < 1 or self.high < self.low:
            raise ConfigError(f"{self}: all at least 1, and low not above high")
        if any(size % self.divisor for size in self.base):
            raise ConfigError(f"base={self.base}: divisor={self.divisor} must divide it; the network is judged there")
        if self.batch % self.devices:
            raise ConfigError(f"batch={self.batch}: devices={self.devices} does not divide it; choose a multiple")

    def table(self, bounds: tuple[float, float] | None = None) -> list[Shape]:
        """The shapes, smallest first.

        Args:
            bounds: heights to stay within, such as a curriculum gives; None for `(low, high)`.
        """
        height, width = self.base
        if self.kind == "ssc_fbs":
            return [Shape(height, width, self.batch)]
        low, high = bounds or (self.low, self.high)
        heights = {divisible(size, self.divisor) for size in (*np.linspace(low, high, self.scales), height)}
        shapes = []
        for h in sorted(heights):
            w = width if h == height else divisible(h * width / height, self.divisor)
            shapes.append(Shape(h, w, self.batch if self.kind == "msc_fbs" else self._batch(h, w)))
        return shapes

    def _batch(self, height: int, width: int) -> int:
        same_pixels = int(round(self.base[0] * self.base[1] * self.batch / (height * width), 2))
        return max(self.devices, same_pixels // self.devices * self.devices)

    def shape_at(self, step: int, *, seed: int = 0, bounds: tuple[float, float] | None = None) -> Shape:
        """The shape of one step, where a sampler chooses the examples: a pure function of seed and step.

        Example:
            >>> shape = MultiScale(base=(8, 8), batch=4, low=4, high=8, scales=2, divisor=4).shape_at(3)
            >>> shape.pixels
            256
        """
        table = self.table(bounds)
        return table[np.random.default_rng((seed, step)).integers(len(table))]

    def epoch(
        self, n: int, epoch: int, *, seed: int = 0, bounds: tuple[float, float] | None = None, start: int = 0
    ) -> Iterator[PlannedStep]:
        """The steps of an epoch: every example once, and at the end the first ones again to fill the last batch.

        All hosts get the same plan and take their parts of it (`effjax.data.of_host`). Drawn again, it is the same:
        a run resumes with the number of the epoch and of the step.

        Args:
            n: number of examples.
            epoch: its number.
            seed: of order and sizes.
            bounds: as in `table`.
            start: steps that are done already.

        Example:
            >>> steps = list(MultiScale(base=(8, 8), batch=4, low=4, high=8, scales=2, divisor=4).epoch(50, 0))
            >>> sorted({(step.shape.height, len(step.ids)) for step in steps})
            [(4, 16), (8, 4)]
        """
        if n < 1:
            raise ConfigError(f"n={n}: at least 1 example")
        table, rng = self.table(bounds), np.random.default_rng((seed, epoch))
        order, done, number = rng.permutation(n).astype(np.int32), 0, 0
        while done < n:
            shape = table[rng.integers(len(table))]
            if number >= start:
                yield PlannedStep(shape, np.take(order, np.arange(done, done + shape.batch), mode="wrap"))
            done, number = done + shape.batch, number + 1


def relative_cost(steps: Sequence[Shape], base: Shape) -> float:
    """Pixels an image, and so operations, over those of the base shape: of a table, what an epoch costs on average.

    Of the steps that were taken it is what they did cost. Shapes are drawn evenly by step, so that small images, of
    which a step has more, are seen more often.

    Example:
        >>> table = MultiScale(base=(224, 224), batch=256, low=128, high=320).table()
        >>> round(relative_cost(table, Shape(224, 224, 256)), 3)
        0.766
    """
    pixels, images = sum(shape.pixels for shape in steps), sum(shape.batch for shape in steps)
    return pixels / images / (base.pixels / base.batch)
