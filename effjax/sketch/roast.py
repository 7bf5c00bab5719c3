"""ROAST: tiles of consecutive weights of all leaves at hashed places of one table."""

import dataclasses

from effjax.sketch.sharing import Sharing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ROAST(Sharing):
    """Random operation access specific tiles (Desai, Zhou and Shrivastava 2023, sections 3 and 4), for `share_params`.

    Tiles of `block` consecutive weights of a leaf lie side by side in the table, so that a tile is one memory access.
    Tiles are placed independently: some slots are read often and some never, also at `ratio=1`, where the dense model
    does not come back. The size of a step in weights grows with the square of a leaf's scale against `table_std`, so
    that training with one learning rate stalls or diverges with a badly chosen one; see `StableRPS`.

    Attributes:
        block: length of a tile.

    Example:
        >>> ROAST(ratio=10, block=8).slots(1000)
        100
    """

    block: int = 8  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"block={self.block}: at least 1")
