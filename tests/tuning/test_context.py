"""The gradient of the context module's recurrence; features are compared in other tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.tuning.context import recurrence


# Frames before, at and after whole turns of the loop.
@pytest.mark.parametrize(("directions", "frames"), [(1, 1), (2, 8), (2, 11)])
def test_the_gradient_of_the_recurrence_is_that_of_the_loop(directions, frames):
    rng = np.random.default_rng(0)
    from_input = jnp.asarray(rng.normal(size=(frames, directions, 3, 20)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(directions, 5, 20)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(frames, directions, 3, 5)), jnp.float32)

    def loop(from_input, kernel):
        hidden = cell = jnp.zeros((directions, 3, 5))
        out = []
        for gates in from_input:
            gates = gates + jnp.einsum("kbd,kdg->kbg", hidden, kernel)
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            out.append(hidden)
        return jnp.stack(out)

    def gradient(run):
        value = lambda *x: (run(*x) * weights).sum()  # noqa: E731
        return jax.value_and_grad(value, argnums=(0, 1))(from_input, kernel)

    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.jit(lambda: gradient(recurrence))(), jax.jit(lambda: gradient(loop))())
