"""The Hopper kernels in Mosaic GPU's interpreter, a process of its own because it may hang: errors as lines of JSON.

python -m tests.kernels_pallas.gpu_interpreter quant codebook

The interpreter lacks what the kernels are made of, so it is given that here: casts between register layouts (which
change no value), reads through a transposed reference, and a left operand of `wgmma` that is in registers. Layouts
are thereby not tested; lowering does that (`test_gpu_lowering.py`), and a GPU (`test_gpu_device.py`).
"""

import json
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.state import indexing
from jax._src.state.types import AbstractRef, TransposeTransform

from effjax.ops.attention import make_question as question
from kernels_pallas.codebook_matmul import gpu as codebook_gpu
from kernels_pallas.decode_attention import gpu as attention_gpu
from kernels_pallas.gpu_tile import Tile
from kernels_pallas.nm_matmul import gpu as nm_gpu
from kernels_pallas.quant_matmul import gpu as quant_gpu
from kernels_pallas.sparse_mlp import gpu as mlp_gpu
from tests.kernels_pallas.oracles import codebook, dense, mlp_neurons, nm_sparse, quantized, some_neurons
from tests.ops.attention_oracle import largest_error, random_case

Interpreter = jaxpr_interpret.JaxprInterpreter
_elementwise = Interpreter._interpret_arithmetic_primitive


def _place(self, eqn):
    return dict(
        device_id=jnp.int32(self.device_info.device_id),
        grid_point_coords=self.grid_point_coords,
        thread_id=self.thread_id,
        source_info=eqn.source_info,
    )


def _read(self, eqn, token, aval, key, transforms):
    """The interpreter's read up to the first transposition, the rest on the value."""
    plain = next((i for i, t in enumerate(transforms) if isinstance(t, TransposeTransform)), len(transforms))
    for t in transforms[:plain]:
        aval = t.transform_type(aval)
    struct = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    token, value = gpu_callbacks.call_get(
        token=token,
        result_shape_and_dtype=struct,
        allocation_key_as_array=key,
        transforms=tuple(transforms[:plain]),
        **_place(self, eqn),
    )
    for t in transforms[plain:]:
        if isinstance(t, TransposeTransform):
            value = jnp.transpose(value, t.permutation)
        else:
            assert all(isinstance(i, indexing.Slice) and isinstance(i.start, int) for i in t.indices)
            value = value[tuple(slice(i.start, i.start + i.size) for i in t.indices)]
    return token, value


def _get(self, eqn, token, get_invals):
    key, *leaves = get_invals()
    return _read(self, eqn, token, eqn.invars[0].aval, key, jax.tree.unflatten(eqn.params["tree"], leaves))


def _wgmma(self, eqn, token, get_invals):
    accumulator, a, b, *leaves = get_invals()
    trees = [eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
    _, a_transforms, b_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    avals = [v.aval for v in eqn.invars]
    if isinstance(avals[1], AbstractRef):
        token, a = _read(self, eqn, token, avals[1], a, a_transforms)
    token, b = _read(self, eqn, token, avals[2], b, b_transforms)
    where = dict(
        result_shape_and_dtype=jax.ShapeDtypeStruct(avals[0].shape, avals[0].dtype),
        allocation_key_as_array=accumulator,
        transforms=(),
        **_place(self, eqn),
    )
    token, total = gpu_callbacks.call_get(token=token, **where)
    total = total + jnp.dot(a, b, preferred_element_type=jnp.float32, precision="highest")
    token, _ = gpu_callbacks.call_swap(token=token, val=total, mask=None, **where)
    return token, []


def _value(self, eqn, get_invals):
    return get_invals()[0] if eqn.primitive is core.layout_cast_p else _elementwise(self, eqn, get_invals)


def extend():
    Interpreter._interpret_get_p = _get
    Interpreter._interpret_wgmma_ref_p = _wgmma
    Interpreter._interpret_arithmetic_primitive = _value


def error(kernel, w, rows, dtype, transpose=False, tile=None, interpreted=True) -> float:
    """The largest error relative to the largest result, in the interpreter or on the GPU that there is."""
    n, out = w.shape
    x = np.random.default_rng(1).standard_normal((rows, out if transpose else n))
    x = jnp.asarray(x, dtype)
    expected = np.asarray(x).astype(np.float64) @ (dense(w).T if transpose else dense(w))

    @jax.jit
    def product(x, w):
        return kernel(x, w, transpose=transpose, tile=tile, interpret=InterpretGPUParams() if interpreted else False)

    actual = product(x, w)
    assert actual.dtype == jnp.float32 and actual.shape == expected.shape
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


def quant() -> Iterator[tuple[str, float]]:
    """Every width, group or none, kind of zero point and type of scale; padding along all three dimensions."""
    half, brain, full = jnp.float16, jnp.bfloat16, jnp.float32
    for bits, n, out, group, zeros, scale_dtype, rows, dtype in (
        (1, 100, 40, None, "symmetric", half, 2, full),
        (2, 128, 128, 64, "real", full, 1, brain),
        (3, 384, 128, 128, "packed", brain, 2, full),
        (4, 256, 256, 128, "symmetric", half, 9, brain),
        (4, 256, 128, 32, "packed", half, 3, full),
        (5, 96, 40, None, "real", half, 1, full),
        (6, 128, 40, 64, "symmetric", full, 1, full),
        (7, 96, 40, None, "packed", half, 1, full),
        (8, 200, 130, None, "packed", full, 17, full),
    ):
        w = quantized(n, out, bits=bits, group=group, zeros=zeros, scale_dtype=scale_dtype)
        yield f"{bits} bits, {n}x{out}, group {group}, {zeros}", error(quant_gpu.quant_matmul, w, rows, dtype)


def transposed() -> Iterator[tuple[str, float]]:
    for bits, n, out, group, zeros, dtype in (
        (4, 256, 256, 128, "packed", jnp.float32),
        (3, 100, 40, None, "packed", jnp.float32),
        (8, 128, 130, 64, "real", jnp.bfloat16),
    ):
        w = quantized(n, out, bits=bits, group=group, zeros=zeros, scale_dtype=jnp.float16)
        name = f"{bits} bits, {n}x{out}, group {group}, {zeros}"
        yield name, error(quant_gpu.quant_matmul, w, 3, dtype, transpose=True)
    w = codebook(256, 128, entries=16, scales=2, scale_dtype=jnp.float16)
    yield "codebook", error(codebook_gpu.codebook_matmul, w, 3, jnp.float32, transpose=True)
    w = nm_sparse(128, 130, n=2, m=4, dtype=jnp.bfloat16)
    yield "2:4", error(nm_gpu.nm_matmul, w, 3, jnp.float32, transpose=True)


def codebooks() -> Iterator[tuple[str, float]]:
    for entries, n, out, tables, scales, top, dtype in (
        (16, 256, 128, (1, 1), 4, None, jnp.bfloat16),
        (16, 100, 140, (1, 140), None, None, jnp.float32),
        (5, 100, 140, (1, 2), 1, None, jnp.float32),
        (3, 256, 40, (1, 1), 4, 2.0, jnp.float32),
    ):
        w = codebook(n, out, entries=entries, tables=tables, scales=scales, global_scale=top, scale_dtype=jnp.float16)
        yield f"{entries} entries, {tables} tables", error(codebook_gpu.codebook_matmul, w, 3, dtype)


def sparse() -> Iterator[tuple[str, float]]:
    for n, m, rows, out in ((2, 4, 64, 130), (4, 8, 128, 40)):
        w = nm_sparse(rows, out, n=n, m=m, dtype=jnp.bfloat16)
        yield f"{n}:{m}", error(nm_gpu.nm_matmul, w, 3, jnp.float32)


def tiles() -> Iterator[tuple[str, float]]:
    """Several blocks along every axis, fewer stages than steps, sums that are split."""
    w = quantized(1024, 512, bits=4, group=128, zeros="packed", scale_dtype=jnp.float16)
    for transpose, tile in (
        (False, Tile(rows=8, columns=256, splits=2, stages=3)),
        (True, Tile(rows=8, splits=2, stages=1)),
    ):
        yield f"{tile}", error(quant_gpu.quant_matmul, w, 20, jnp.bfloat16, transpose=transpose, tile=tile)


def attention() -> Iterator[tuple[str, float]]:
    """Ragged lengths and windows in several splits, more steps than stages, pages of all sizes."""
    for name, splits, stages, shape in (
        ("bfloat16", 2, 2, dict(slots=512, head_dim=32)),
        ("float16, 80 wide", 1, 3, dict(slots=128, head_dim=80, group=9, dtype="float16")),
        ("pages of 16", 3, 2, dict(slots=320, head_dim=16, page=16)),
        ("pages of 128", 1, 1, dict(slots=256, head_dim=16, page=128)),
        ("int8", 2, 2, dict(slots=192, head_dim=32, keys="channel-8", values="token-8")),
        ("int4, pages of 64", 1, 2, dict(slots=192, head_dim=64, page=64, keys="channel-4", values="token-4")),
        ("dense keys, int8 values", 1, 1, dict(slots=64, head_dim=32, values="token-8")),
    ):
        case = random_case(**{"dtype": "bfloat16", "window": True} | shape)
        a = question("test", case.q, case.k, case.v, case.length, case.start, case.asked, case.table, None)
        tile = attention_gpu.Tile(splits=splits, stages=stages)
        answer = jax.jit(
            lambda a, tile=tile: attention_gpu.decode_attention(a, tile=tile, interpret=InterpretGPUParams())
        )
        yield name, largest_error(case, answer(a))


def mlp_error(neurons, x, chosen, count, block=1, tile=None, interpreted=True) -> float:
    """As `error`, for some neurons of an MLP."""
    interpret = InterpretGPUParams() if interpreted else False

    @jax.jit
    def run(x, neurons, chosen, count):
        return mlp_gpu.sparse_mlp(x, neurons, chosen, count, block=block, tile=tile, interpret=interpret)

    actual = run(x, neurons, jnp.asarray(chosen, jnp.int32), jnp.int32(count))
    expected = some_neurons(x, neurons, chosen, count, block)
    assert actual.dtype == jnp.float32 and actual.shape == expected.shape
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


def mlp() -> Iterator[tuple[str, float]]:
    """All activations, more shares than work and the other way round, numbers of no neuron, blocks, none at all."""
    for name, (dtype, gated, activation, biased), rows, block, tile, chosen, count in (
        ("relu", ("bfloat16", False, "relu", True), 1, 1, None, [95, 3, 8, 50, 7], 5),
        ("silu", ("bfloat16", True, "silu", False), 2, 8, (2, 3), [-1, 5, 99, 1, 0], 4),
        ("gelu", ("float32", True, "gelu", True), 3, 1, (1, 2), [4, 9, 1, 96, 20], 4),
        ("more shares than neurons", ("float32", False, "gelu", False), 1, 1, (5, 2), [4, 9, 1], 3),
        ("none that counts", ("float32", False, "relu", True), 2, 1, (2, 2), [4, 9], 0),
    ):
        neurons = mlp_neurons(128, 96, 384, dtype, gated, activation=activation, shift=0.25, biased=biased)
        x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 128)), dtype)
        cut = None if tile is None else mlp_gpu.Tile(shares=tile[0], neurons=tile[1])
        yield name, mlp_error(neurons, x, chosen, count, block, cut)


GROUPS = {
    "quant": quant,
    "transposed": transposed,
    "codebook": codebooks,
    "sparse": sparse,
    "tiles": tiles,
    "attention": attention,
    "mlp": mlp,
}

if __name__ == "__main__":
    extend()
    for group in sys.argv[1:]:
        for name, off in GROUPS[group]():
            print(json.dumps({"group": group, "case": name, "error": off}), flush=True)
