"""Order statistics against a sort, at ties, infinities and both ends of the range."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.kv.order import order_statistic, ordered_bits

FLOATS = st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, np.inf, -np.inf, 1.0, -1.0]))


@settings(max_examples=60)
@given(st.lists(FLOATS, min_size=7, max_size=7), st.integers(0, 6))
def test_it_is_the_sorted_number(numbers, index):
    numbers = np.asarray(numbers, np.float32)
    numbers = np.where(np.abs(numbers) < np.finfo(np.float32).tiny, 0, numbers)  # a processor may flush what is less
    bits = ordered_bits(jnp.asarray(numbers))
    found = order_statistic(bits, jnp.array([index]))
    assert numbers[int(np.flatnonzero(np.asarray(bits) == int(found[0]))[0])] == np.sort(numbers)[index]


def test_each_row_has_an_index_of_its_own():
    bits = jnp.array([[3, 1, 2], [-5, 2**31 - 1, -(2**31)]])
    assert order_statistic(bits, jnp.array([[0], [2]])).tolist() == [[1], [2**31 - 1]]
    assert order_statistic(bits[1:], jnp.array([[0]])).tolist() == [[-(2**31)]]
    assert order_statistic(bits[:1], jnp.array([[1]]), low=0, high=7).tolist() == [[2]]
