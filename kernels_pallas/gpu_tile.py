"""How the Hopper kernels cut a product, and the heuristic that decides it from the shapes."""

import dataclasses

from kernels_pallas.gpu_packed import BLOCK, Packed, round_up

MULTIPROCESSORS = 132  # of an H100 SXM and an H200
REGISTERS = 160  # a thread has for packed words and accumulators, of 255
ACCUMULATORS = 128  # of these, at most, for accumulators
SHARED_BYTES = 227 * 1024  # of a multiprocessor, that its blocks share
RESERVED_BYTES = 4096  # of a block's, for barriers and what the compiler keeps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows: rows of `x` a block of threads takes, a multiple of 8; they are padded to it.
        columns: outputs a block of threads takes, a multiple of 128 (forward; a transposed product takes 64 runs).
        splits: blocks that share a contraction; their partial sums are added afterwards.
        stages: steps of the contraction that are in flight.
    """

    rows: int
    columns: int = 2 * BLOCK
    splits: int = 1
    stages: int = 4

    def __post_init__(self) -> None:
        if self.rows < 8 or self.rows > 256 or self.rows % 8:
            raise ValueError(f"rows={self.rows}: a tile has 8 to 256 rows, a multiple of 8")
        if self.columns < 2 * BLOCK or self.columns % (2 * BLOCK):
            raise ValueError(f"columns={self.columns}: a tile has a multiple of {2 * BLOCK} outputs")
        if self.splits < 1 or self.stages < 1:
            raise ValueError(f"splits={self.splits}, stages={self.stages}: both are at least 1")


def choose_tile(rows: int, packed: Packed, *, transpose: bool = False, multiprocessors: int = MULTIPROCESSORS) -> Tile:
    """A tile from the shapes alone: blocks for every multiprocessor, and accumulators that fit its registers.

    Args:
        rows: rows of `x`, counting each bf16 term of a float32 as one.
        packed: the matrix.
        transpose: for the product with `W.T`.
        multiprocessors: of the GPU.
    """
    accumulators = packed.run if transpose else 2
    runs, pairs = (BLOCK, contraction_pairs(packed)) if transpose else (packed.step, BLOCK)
    free = min(ACCUMULATORS, REGISTERS - word_registers(packed, runs, pairs) - table_registers(packed))
    # Groups need the partial product of a group beside the sum, hence half the registers.
    share = 1 if transpose or packed.scale is None else 2
    most = max(8, 2 * max(free, 0) // (accumulators * share) // 8 * 8)
    tile_rows = min(round_up(rows, 8), most, 128)
    while tile_rows > 8 and 2 * stage_bytes(packed, Tile(rows=tile_rows), transpose=transpose) > SHARED_BYTES // 2:
        tile_rows = round_up(tile_rows // 2, 8)
    blocks = packed.pairs // BLOCK
    wide = (
        not transpose
        and not any(table.ndim > 1 for table in packed.constants)
        and tile_rows <= 16
        and blocks % 2 == 0
        and blocks >= 2 * multiprocessors // 4
    )
    columns = 2 * BLOCK * (2 if wide else 1)
    across = packed.runs // BLOCK if transpose else 2 * packed.pairs // columns
    steps = blocks if transpose else packed.runs // packed.step
    running = across * -(-rows // tile_rows)
    # Two blocks a multiprocessor hide each other's waits; at least four steps each fill the pipeline.
    wanted = [k for k in range(1, steps // 4 + 1) if steps % k == 0 and running * k <= 3 * multiprocessors]
    splits = max(wanted, default=1) if running < 2 * multiprocessors else 1
    tile = Tile(rows=tile_rows, columns=columns, splits=splits)
    # Three blocks share a multiprocessor where two steps of each fit.
    step = stage_bytes(packed, tile, transpose=transpose)
    stages = min(max(SHARED_BYTES // 3 // step, 2), 6)
    return dataclasses.replace(tile, stages=stages if stages * step <= SHARED_BYTES - RESERVED_BYTES else 1)


def contraction_pairs(packed: Packed) -> int:
    """Pairs of outputs that a transposed product unpacks at once: all 64 of a step, or half where words are many."""
    return BLOCK if word_registers(packed, BLOCK, BLOCK) <= ACCUMULATORS // 2 else BLOCK // 2


def word_registers(packed: Packed, runs: int, pairs: int) -> int:
    """Registers a thread that the packed words of so many runs and pairs take."""
    return sum(array.dtype.itemsize for array, _ in packed.planes) * runs * pairs // (4 * 128)


def table_registers(packed: Packed) -> int:
    """Registers a thread that tables of a column each take: two words an entry, and their halves and differences."""
    return sum(4 * table.shape[0] for table in packed.constants if table.ndim > 1)


def stage_bytes(packed: Packed, tile: Tile, *, transpose: bool = False) -> int:
    """Shared memory of one step in flight."""
    pairs = BLOCK if transpose else tile.columns // 2
    runs = BLOCK if transpose else packed.step
    codes = sum(runs * pairs * array.dtype.itemsize for array, _ in packed.planes)
    sides = sum(pairs * side.dtype.itemsize for side in packed.sides)
    return codes + sides + 2 * tile.rows * (2 * pairs if transpose else packed.run * runs)
