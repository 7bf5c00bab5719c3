"""The tables of the common suite: array types and methods, a row each. A new one is accepted when its row passes."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import effjax as ej
from effjax import arrays
from effjax.arrays.hashed import Hashed
from effjax.lift.calibrate import InputStats
from effjax.paths import map_with_paths

STACKED = 4
KEY = 7


def stream(codes: int, bits: int) -> int:
    """Bytes of a packed column."""
    return math.ceil(codes * bits / 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayCase:
    """One array type with one choice of its metadata.

    Attributes:
        name: shown by pytest.
        make: `make(w)`: an array that holds `w [*L, in, out]`, or something like it.
        inputs, outputs: the matrix.
        matrix_bytes: bytes of one matrix, from arithmetic that does not look at the array.
        shared_bytes: bytes that differ with the dtype of the weight, per byte of that dtype.
        einsum: the product of the tests, "x, weight -> result", without stacked axes.
        dims: the shape of one weight.
        sharded: which dimensions of a weight (negative) eight devices can really cut.
    """

    name: str
    make: Callable[[jax.Array], arrays.CompressedArray]
    inputs: int = 128
    outputs: int = 32
    matrix_bytes: int
    shared_bytes: int = 0
    einsum: str = "bi,io->bo"
    dims: tuple[int, ...] | None = None
    sharded: tuple[int, ...] = (-2, -1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.inputs, self.outputs) if self.dims is None else self.dims

    def nbytes(self, lead: tuple[int, ...], dtype: Any) -> int:
        return math.prod(lead) * (self.matrix_bytes + self.shared_bytes * jnp.dtype(dtype).itemsize)


def quantized(name: str, matrix_bytes: int, *, inputs: int = 128, sharded: Any = (-2, -1), **options: Any) -> ArrayCase:
    method = ej.quantize.RTN(**options)
    return ArrayCase(name=name, make=method.quantize, inputs=inputs, matrix_bytes=matrix_bytes, sharded=sharded)


def codebook(entries: int, in_groups: int, out_groups: int, scale_groups: int | None) -> Callable[..., Any]:
    def make(w: jax.Array) -> arrays.Codebook:
        *lead, n, out = w.shape
        codes = jnp.floor(jax.nn.sigmoid(w.astype(jnp.float32)) * entries).astype(jnp.int32).clip(0, entries - 1)
        values = jnp.linspace(-1.5, 1.5, in_groups * out_groups * entries).reshape(entries, in_groups, out_groups)
        tables = jnp.broadcast_to(jnp.moveaxis(values, 0, -1), (*lead, in_groups, out_groups, entries))
        scales = None
        if scale_groups is not None:
            scales = jnp.abs(w.astype(jnp.float32)).reshape(*lead, scale_groups, n // scale_groups, out).mean(-2)
        return arrays.Codebook.from_codes(codes, tables, scales, dtype=w.dtype)

    return make


def hashed(slots: int, block: int) -> Callable[..., Any]:
    def make(w: jax.Array) -> Hashed:
        *lead, n, out = w.shape
        return Hashed(
            table=w.reshape(*lead, -1)[..., :slots],
            seed=jnp.arange(5, 5 + math.prod(lead), dtype=jnp.uint32).reshape(lead),
            in_features=n,
            out_features=out,
            block=block,
            dtype=np.dtype(w.dtype),
        )

    return make


def shared(slots: int, block: int | None) -> Callable[..., Any]:
    def make(w: jax.Array) -> arrays.Shared:
        *lead, n, out = w.shape
        index = jnp.arange(math.prod(lead), dtype=jnp.uint32).reshape(lead)
        return arrays.Shared(
            table=w.reshape(*lead, -1)[..., :slots],
            seed=jnp.full(lead, 5, jnp.uint32),
            start=77 + index * jnp.uint32(n * out),
            exponent=(index % 3).astype(jnp.int32) - 1,
            in_features=n,
            out_features=out,
            block=block,
            dtype=np.dtype(w.dtype),
        )

    return make


def n_of_m(n: int, m: int) -> Callable[..., Any]:
    def make(w: jax.Array) -> arrays.NMSparse:
        mask = ej.prune.Magnitude(pattern=f"{n}:{m}").mask(w)
        return arrays.NMSparse.from_dense(w, mask, n=n, m=m)

    return make


def quantized_2_of_4(w: jax.Array) -> arrays.NMSparse:
    sparse = n_of_m(2, 4)(w)
    return sparse.replace(values=ej.quantize.RTN(bits=4, group_size=16, symmetric=True).quantize(sparse.values))


def prepared(w: jax.Array) -> arrays.Prepared:
    # Neither in tiles nor column by column, which meshes cannot cut.
    return ej.prepare({"kernel": codebook(8, 1, 1, 4)(w)}, activation_bits=16)["kernel"]


def low_rank(rank: int) -> Callable[..., Any]:
    return lambda w: arrays.LowRank(a=w[..., :, :rank], b=w[..., :rank, :] / 4, dtype=np.dtype(w.dtype))


def quantized_plus_low_rank(w: jax.Array) -> arrays.Sum:
    return arrays.Sum(parts=(ej.quantize.RTN(bits=2, group_size=32).quantize(w), low_rank(4)(w)))


def row_scaled(w: jax.Array) -> arrays.RowScaled:
    scales = 0.5 + jnp.arange(w.shape[-2], dtype=jnp.float32) / w.shape[-2]
    array = ej.quantize.RTN(bits=4, group_size=16).quantize(w)
    return arrays.RowScaled(array=array, row_scales=jnp.broadcast_to(scales, w.shape[:-1]))


def permuted(w: jax.Array) -> arrays.Permuted:
    *lead, n, _ = w.shape
    order = jax.random.permutation(jax.random.key(5), n).astype(jnp.int32)
    array = ej.quantize.RTN(bits=4, group_size=16).quantize(jnp.take(w, order, axis=-2))
    return arrays.Permuted(array=array, order=jnp.broadcast_to(order, (*lead, n)))


def two_levels(w: jax.Array) -> arrays.Codebook:
    """Scales of eight bits under one of 32, as NVFP4 has them."""
    plain = codebook(16, 1, 1, 8)(w)
    top = jnp.full((*w.shape[:-2], 1, 1), 3.0, jnp.float32)
    return plain.replace(scales=plain.scales.astype(jnp.float8_e4m3fn), global_scale=top)


def user_tables(w: jax.Array) -> arrays.UserTables:
    """Nobody's rows: the base."""
    base = codebook(8, 4, 32, None)(w)
    tables = jnp.stack([base.tables, 2 * base.tables, -base.tables], axis=base.ndim - 2)
    return arrays.UserTables(array=base, tables=tables)


def seen_as(dims: tuple[int, ...], in_axes: tuple[int, ...], out_axes: tuple[int, ...]) -> Callable[..., Any]:
    def make(w: jax.Array) -> arrays.CompressedArray:
        compressed = ej.quantize.RTN(bits=4, group_size=16).quantize(w)
        return arrays.unfold(compressed, (*w.shape[:-2], *dims), in_axes, out_axes)

    return make


COLUMNS = 32
ARRAYS = (
    quantized("q8 symmetric per channel", 128 * 32 + 2 * 32, bits=8, symmetric=True, group_size=None),
    quantized("q4 asymmetric g16", 64 * 32 + 8 * 32 * 2 + 4 * 32, bits=4, group_size=16),
    # Four groups of 3-bit zero points are twelve bits: no cut along the inputs falls between their bytes.
    quantized("q3 asymmetric g32", (48 + 4 * 2 + 2) * 32, bits=3, group_size=32, sharded=(-1,)),
    quantized("q5 asymmetric odd", (stream(61, 5) + 2 + 1) * 32, bits=5, group_size=None, inputs=61, sharded=(-1,)),
    quantized(
        "q2 symmetric odd", (stream(61, 2) + 2) * 32, bits=2, symmetric=True, group_size=None, inputs=61, sharded=(-1,)
    ),
    quantized("q1 symmetric g16", (16 + 8 * 4) * 32, bits=1, symmetric=True, group_size=16, scale_dtype="float32"),
    ArrayCase(
        name="q4 real zeros",
        make=ej.quantize.HQQ(bits=4, group_size=16).quantize,
        matrix_bytes=(64 + 8 * 2 + 8 * 2) * 32,
    ),
    ArrayCase(name="codebook per matrix", make=codebook(16, 1, 1, None), matrix_bytes=64 * 32 + 4 * 16),
    ArrayCase(name="codebook per column", make=codebook(8, 1, 32, None), matrix_bytes=48 * 32 + 4 * 8 * 32),
    ArrayCase(name="codebook per group", make=codebook(5, 4, 8, 8), matrix_bytes=(48 + 4 * 8) * 32 + 4 * 5 * 32),
    ArrayCase(
        name="codebook odd", make=codebook(3, 1, 1, 1), inputs=61, matrix_bytes=(16 + 4) * 32 + 4 * 3, sharded=(-1,)
    ),
    ArrayCase(name="nf4", make=ej.quantize.NF4(block_size=32).quantize, matrix_bytes=(64 + 4 * 2) * 32 + 4 * 16),
    ArrayCase(name="hashed", make=hashed(512, 1), matrix_bytes=4, shared_bytes=512, sharded=()),
    ArrayCase(name="hashed in blocks", make=hashed(500, 8), matrix_bytes=4, shared_bytes=500, sharded=()),
    ArrayCase(name="shared, folded", make=shared(509, None), matrix_bytes=12, shared_bytes=509, sharded=()),
    ArrayCase(name="shared in tiles", make=shared(512, 16), matrix_bytes=12, shared_bytes=512, sharded=()),
    ArrayCase(name="2:4", make=n_of_m(2, 4), matrix_bytes=64 * 2 // 8 * 32, shared_bytes=64 * 32),
    ArrayCase(name="2:4 of 4 bits", make=quantized_2_of_4, matrix_bytes=(32 + 16 + 4 * 2) * 32),
    ArrayCase(name="prepared", make=prepared, matrix_bytes=(48 + 4 * 4) * 32 + 4 * 8),
    ArrayCase(name="1:3", make=n_of_m(1, 3), inputs=96, matrix_bytes=32 * 2 // 8 * 32, shared_bytes=32 * 32),
    ArrayCase(
        name="adapter",
        make=lambda w: arrays.Adapter(**vars(low_rank(8)(w))),
        matrix_bytes=0,
        shared_bytes=8 * (128 + 32),
    ),
    ArrayCase(name="low rank", make=low_rank(8), matrix_bytes=0, shared_bytes=8 * (128 + 32)),
    ArrayCase(
        name="q2 plus low rank",
        make=quantized_plus_low_rank,
        matrix_bytes=(32 + 4 * 2 + 1) * 32,
        shared_bytes=4 * (128 + 32),
        sharded=(-1,),  # its four 2-bit zero points are one byte
    ),
    ArrayCase(name="user tables", make=user_tables, matrix_bytes=48 * 32 + 4 * (4 * 32 * 8) * 4),
    ArrayCase(name="two levels of scales", make=two_levels, matrix_bytes=64 * 32 + 4 * 16 + 8 * 32 + 4),
    ArrayCase(name="row scaled", make=row_scaled, matrix_bytes=(64 + 8 * 2 + 4) * 32 + 4 * 128),
    ArrayCase(name="permuted", make=permuted, matrix_bytes=(64 + 8 * 2 + 4) * 32 + 4 * 128, sharded=(-1,)),
    ArrayCase(
        name="query kernel",
        make=seen_as((128, 4, 8), (-3,), (-2, -1)),
        dims=(128, 4, 8),
        matrix_bytes=(64 + 8 * 2 + 4) * 32,
        einsum="bi,ihk->bhk",
        sharded=(-3, -2),
    ),
    ArrayCase(
        name="embedding",
        make=seen_as((32, 128), (-1,), (-2,)),
        dims=(32, 128),
        matrix_bytes=(64 + 8 * 2 + 4) * 32,
        einsum="bi,vi->bv",
    ),
)


@functools.cache
def weight(inputs: int, outputs: int, lead: tuple[int, ...], dtype: str, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*lead, inputs, outputs), dtype)


@functools.cache
def example(case: ArrayCase, lead: tuple[int, ...] = (), dtype: str = "float32", seed: int = 0) -> Any:
    """The compressed array of a case; made once for all tests."""
    return jax.jit(case.make)(weight(case.inputs, case.outputs, lead, dtype, seed))


@functools.cache
def dense(case: ArrayCase, lead: tuple[int, ...] = (), dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """What `example` materialises to, float32 on the host."""
    return np.asarray(materialized(example(case, lead, dtype, seed)), np.float32)


@jax.jit
def materialized(w: arrays.CompressedArray) -> jax.Array:
    return w.materialize()


def inputs(case: ArrayCase, rows: int = 8, dtype: str = "float32", seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, case.inputs), dtype)


def multiply(case: ArrayCase) -> Callable[[Any, jax.Array], jax.Array]:
    """The model of the tests, written for dense weights."""
    return lambda params, x: jnp.einsum(case.einsum, x, params["w"])


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float32)))))


def assert_same_bytes(a: Any, b: Any) -> None:
    """Same structure (type and metadata), dtypes, shapes and bytes; the devices may differ."""
    assert jax.tree.structure(a) == jax.tree.structure(b), f"{jax.tree.structure(a)} != {jax.tree.structure(b)}"
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        where = jax.tree_util.keystr(path)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), f"{where}: {x.dtype}{x.shape} and {y.dtype}{y.shape}"
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), f"{where}: the bytes differ"


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind, kind))


def place(tree: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def spec_of(ndim: int, dim: int) -> PartitionSpec:
    """ "tensor" at (negative) dimension `dim`."""
    return PartitionSpec(*("tensor" if d == ndim + dim else None for d in range(ndim)))


def statistics(inputs: int, lead: tuple[int, ...] = (), outputs: int = 1) -> InputStats:
    """Second moments and magnitudes of correlated inputs, and a Fisher diagonal over a few orders of magnitude."""
    x = jax.random.normal(jax.random.key(3), (*lead, 256, inputs)) @ jax.random.normal(jax.random.key(4), (inputs,) * 2)
    fisher = jnp.exp(2 * jax.random.normal(jax.random.key(5), (*lead, inputs, outputs)))
    return InputStats(
        count=jnp.full(lead, 256.0),
        outer_sum=x.mT @ x,
        abs_sum=jnp.abs(x).sum(-2),
        square_sum=jnp.square(x).sum(-2),
        fisher_sum=fisher,
        examples=jnp.full(lead, 16.0),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodCase:
    """One method of compression.

    Attributes:
        name: shown by pytest.
        method: hyper-parameters.
        transform: `quantize_params`, `sketch_params` or `prune_mask`.
    """

    name: str
    method: Any
    transform: Callable[..., Any]

    @property
    def draws(self) -> bool:
        return self.method.needs_key

    def __call__(self, params: Any, *, seed: Any = KEY, stats: Any = None) -> Any:
        key = jax.random.key(seed) if self.draws else None
        return self.transform(params, self.method, stats=stats, key=key)

    def stats(self, params: Any) -> Any:
        """Statistics for the methods that need them, as `calibrate` would give."""
        if not self.method.needs:
            return None
        return map_with_paths(
            lambda path, w: statistics(w.shape[-2], w.shape[:-2], w.shape[-1]) if path.endswith("kernel") else None,
            params,
        )


def _methods(transform: Callable[..., Any], **methods: Any) -> list[MethodCase]:
    return [MethodCase(name=name, method=method, transform=transform) for name, method in methods.items()]


METHODS = (
    *_methods(
        ej.quantize_params,
        rtn4=ej.quantize.RTN(bits=4, group_size=16),
        rtn3_mse=ej.quantize.RTN(bits=3, group_size=32, symmetric=True, clip="mse", steps=8),
        rtn2_mse=ej.quantize.RTN(bits=2, group_size=None, clip="mse", steps=8),
        rtn1=ej.quantize.RTN(bits=1, group_size=16, symmetric=True),
        nf4=ej.quantize.NF4(block_size=32),
        nvfp4=ej.quantize.NVFP4(),
        mxfp4=ej.quantize.MXFP4(exponent="ceil"),
        fp8=ej.quantize.FP8(),
        hqq3=ej.quantize.HQQ(bits=3, group_size=16),
        awq4=ej.quantize.AWQ(bits=4, group_size=16),
        squeezellm3=ej.quantize.SqueezeLLM(bits=3),
        gptq3_by_activity=ej.quantize.GPTQ(bits=3, group_size=32, act_order=True),
        lean_quant3=ej.quantize.LeanQuant(bits=3, group_size=16),
        kmeans3_groups=ej.quantize.DKM(bits=3, group_columns=8),
    ),
    *_methods(
        ej.sketch_params,
        spallm2_slices=ej.sketch.SpaLLM(bits=2, groups=4),
        low_rank=ej.sketch.LowRank(rank=4),
        low_rank_weighted=ej.sketch.LowRank(ratio=4, weighted=True),
        hashed=ej.sketch.Hashed(ratio=4),
        hashed_blocks=ej.sketch.Hashed(ratio=4, block=4),
    ),
    *_methods(
        ej.prune_mask,
        magnitude=ej.prune.Magnitude(sparsity=0.6),
        magnitude_global=ej.prune.Magnitude(sparsity=0.6, scope="global"),
        magnitude_2_4=ej.prune.Magnitude(pattern="2:4"),
        magnitude_blocks=ej.prune.Magnitude(sparsity=0.5, pattern="4x8"),
        random=ej.prune.Random(sparsity=0.5),
        random_1_4=ej.prune.Random(pattern="1:4"),
        highest=ej.prune.Highest(sparsity=0.5),
        wanda=ej.prune.Wanda(sparsity=0.5),
        sparsegpt_2_4=ej.prune.SparseGPT(pattern="2:4"),
    ),
)


def method_params(seed: int = 0, lead: tuple[int, ...] = ()) -> dict[str, Any]:
    """Two matrices of different shapes, and leaves that no method may touch."""
    return {
        "mlp": {"kernel": weight(64, 32, lead, "float32", seed), "bias": jnp.zeros((*lead, 32))},
        "out": {"kernel": weight(32, 64, lead, "float32", seed + 1)},
        "embed": {"embedding": weight(8, 64, (), "float32", seed + 2)},
    }
