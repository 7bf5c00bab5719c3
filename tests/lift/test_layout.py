"""Layouts against numpy: any chain of transposes, reshapes, squeezes and new axes, and contractions in them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.arrays import Quantized, View
from effjax.lift.dot import contraction, dot
from effjax.lift.layout import Layout
from effjax.lift.operand import Operand, Probe, operand
from tests.lift.kinds import assert_close, compress

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])
SHAPES = st.lists(SIZES, min_size=2, max_size=3).map(tuple)


def factorisations(n, draw, limit=5):
    """A random shape of `n` entries."""
    shape = []
    while n > 1 and len(shape) < limit - 1:
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        n //= shape[-1]
    return (*shape, n)


def cuts_an_atom(layout, shape):
    """Whether a row-major reshape to `shape` needs a boundary inside an atom that its size does not divide into.

    Boundaries between dimensions are products of leading sizes; those of the layout's atoms are where stored parts
    meet. A boundary is possible where it is a multiple or a divisor of every atom boundary it has to pass.
    """
    atoms = [layout.size_of(atom) for dim in layout.dims for atom in dim]
    ends, total = [], 1
    for size in atoms:
        total *= size
        ends.append(total)
    boundary = 1
    for size in shape:
        boundary *= size
        before = max([e for e in [1, *ends] if e <= boundary], default=1)
        after = min([e for e in ends if e >= boundary], default=total)
        if boundary % before or after % boundary:
            return True
    return False


@settings(max_examples=25)
@given(st.data())
def test_chains_of_operations_equal_numpy(data):
    shape = data.draw(SHAPES)
    array = np.arange(math.prod(shape)).reshape(shape)
    layout = Layout.of_shape(shape)
    assert layout.is_identity and layout.shape == shape
    for name in data.draw(st.lists(st.sampled_from(["transpose", "reshape", "squeeze", "expand"]), max_size=6)):
        if name == "transpose":
            order = tuple(data.draw(st.permutations(range(array.ndim))))
            array, layout = array.transpose(order), layout.transpose(order)
        elif name == "squeeze":
            ones = [d for d, size in enumerate(array.shape) if size == 1]
            gone = tuple(data.draw(st.sets(st.sampled_from(ones)))) if ones else ()
            array, layout = array.squeeze(gone), layout.squeeze(gone)
        elif name == "expand":
            position = data.draw(st.integers(0, array.ndim))
            array, layout = np.expand_dims(array, position), layout.expand((position,))
        else:
            new = factorisations(array.size, data.draw)
            reshaped = layout.reshape(new)
            assert (reshaped is None) == cuts_an_atom(layout, new)
            if reshaped is None:
                continue
            array, layout = array.reshape(new), reshaped
        assert layout.shape == array.shape
    seen = Operand(Probe(jnp.arange(math.prod(shape)).reshape(shape)), layout, "w")
    np.testing.assert_array_equal(seen.materialize(), array)


def test_reshape_is_refused_only_where_an_atom_is_cut():
    layout = Layout.of_shape((6, 4))
    assert layout.reshape((2, 3, 4)) is not None
    assert layout.reshape((24,)) is not None
    assert layout.reshape((4, 6)) is None
    merged = layout.transpose((1, 0)).reshape((24,))
    assert merged is not None and merged.reshape((4, 6)) is not None and merged.reshape((6, 4)) is None


def test_resized_shard_keeps_the_minor_parts():
    layout = Layout.of_shape((16, 24)).reshape((16, 3, 8))
    assert layout.resized((16, 8)).shape == (16, 1, 8)
    assert layout.resized((4, 24)).shape == (4, 3, 8)


def test_views_become_layouts():
    w = compress(jnp.ones((2, 16, 8)), "quantized", "*")
    kernel = View(
        array=compress(jnp.ones((16, 16)), "quantized", "*"), in_dims=(-1,), out_dims=(-1, 8), order=(0, 1, 2)
    )
    for view in (kernel, View(array=kernel.array, in_dims=(-1,), out_dims=(-1,), order=(1, 0))):
        seen = operand(view, "w")
        assert seen.shape == view.shape and isinstance(seen.array, Quantized)
        np.testing.assert_array_equal(seen.materialize(), view.materialize())
    assert operand(w, "w").layout.is_identity


@settings(max_examples=15)
@given(st.data())
def test_contractions_in_random_layouts_equal_lax(data):
    """Random layouts and dimension numbers, the weight on either side, against the dense dot_general."""
    stacked = data.draw(st.sampled_from([(), (2,), (3,), (2, 3)]))
    shape = (*stacked, 8, 4)
    w = compress(jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32), "quantized", "*")
    layout = Layout.of_shape(shape)
    split_in = data.draw(st.sampled_from([(8,), (2, 4), (4, 2)]))
    split_out = data.draw(st.sampled_from([(4,), (2, 2)]))
    view = layout.reshape((*stacked, *split_in, *split_out))
    order = tuple(data.draw(st.permutations(range(len(view.dims)))))
    view = view.transpose(order)
    seen = Operand(w, view, "w")
    first_out = len(stacked) + len(split_in)
    over_out = data.draw(st.booleans())
    inner = [d for d, o in enumerate(order) if (o >= first_out if over_out else len(stacked) <= o < first_out)]
    batch = [d for d, o in enumerate(order) if o < len(stacked) and data.draw(st.booleans())]
    inner, batch = list(data.draw(st.permutations(inner))), list(data.draw(st.permutations(batch)))
    free = data.draw(st.lists(st.sampled_from([2, 5]), max_size=2))
    sizes = [view.shape[d] for d in batch] + [view.shape[d] for d in inner] + free
    x_order = data.draw(st.permutations(range(len(sizes))))
    position = {d: i for i, d in enumerate(x_order)}
    x = jnp.asarray(np.random.default_rng(1).normal(size=[sizes[d] for d in x_order]), jnp.float32)
    x_batch = [position[i] for i in range(len(batch))]
    x_inner = [position[len(batch) + i] for i in range(len(inner))]
    w_first = data.draw(st.booleans())
    dense = seen.materialize()
    if w_first:
        numbers = ((tuple(inner), tuple(x_inner)), (tuple(batch), tuple(x_batch)))
        expected = jax.lax.dot_general(dense, x, numbers)
    else:
        numbers = ((tuple(x_inner), tuple(inner)), (tuple(x_batch), tuple(batch)))
        expected = jax.lax.dot_general(x, dense, numbers)
    c = contraction(view, x.ndim, numbers, w_first)
    assert c is not None
    product = dot(seen, x, c, precision=None, out_dtype=jnp.float32)
    assert product is not None
    assert_close(product, expected)


def test_contractions_that_are_no_product_with_the_matrix():
    layout = Layout.of_shape((3, 8, 4))
    w = Operand(compress(jnp.ones((3, 8, 4)), "quantized", "*"), layout, "w")
    both = contraction(layout, 3, (((1, 2), (1, 2)), ((), ())), True)
    assert dot(w, jnp.ones((2, 8, 4)), both, precision=None, out_dtype=jnp.float32) is None
    over_layers = contraction(layout, 2, (((0,), (1,)), ((), ())), True)
    assert dot(w, jnp.ones((2, 3)), over_layers, precision=None, out_dtype=jnp.float32) is None
    half = Layout.of_shape((8, 4)).reshape((2, 4, 4))
    assert contraction(half, 2, (((0,), (1,)), ((), ())), True) is None
