"""Values and gradients; that few collectives are needed is tested in test_collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.training import sharding
from vop_jax.training.sharding import map_rows_for_gradient


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8), (1, 8, 1)])
def test_what_a_device_does_on_its_own_is_the_same(shape):
    """Values and gradients, of parameters that are copied and of CLIP's that are not."""
    mesh = sharding.make_mesh(*shape)
    rng = np.random.default_rng(0)
    tree = {"clip": {"w": rng.normal(size=(3, 4))}, "prompts": {"p": rng.normal(size=(2, 4))}}
    tree, frozen = jax.tree.map(np.float32, (tree, rng.normal(size=(1, 4))))
    rows = {"x": rng.normal(size=(16, 3)).astype(np.float32)}

    def function(tree, frozen, rows):
        y = rows["x"] @ tree["clip"]["w"] + frozen
        return jnp.tanh(y), jnp.einsum("bd,pd->b", y, tree["prompts"]["p"])

    def loss(run, tree):
        a, b = run(tree, frozen, rows)
        assert a.shape == (16, 4) and b.shape == (16,)
        return ((a @ a.T) ** 2).sum() + (b * jnp.arange(16.0)).sum()

    run = map_rows_for_gradient(mesh, function)
    placed = jax.device_put(rows, sharding.batch_sharding(mesh))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        jax.jit(run)(tree, frozen, placed),
        function(tree, frozen, rows),
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4),
        jax.jit(jax.grad(lambda t: loss(run, t)))(tree),
        jax.grad(lambda t: loss(function, t))(tree),
    )
