"""The recurrence of the context module, against PyTorch's."""

import jax
import numpy as np
import pytest

from vop_jax.tuning.context import Lstm


@pytest.mark.parametrize("directions", [1, 2])
def test_lstm_is_pytorchs(directions):
    torch = pytest.importorskip("torch", reason="the peer is torch.nn.LSTM")
    width, frames = 6, 5
    peer = torch.nn.LSTM(width, width, batch_first=True, bidirectional=directions == 2)
    x = np.random.default_rng(0).normal(size=(3, frames, width)).astype(np.float32)
    with torch.no_grad():
        expected = peer(torch.from_numpy(x))[0].numpy()

    def stacked(kind, transpose):
        names = [f"{kind}_l0", f"{kind}_l0_reverse"][:directions]
        rows = [getattr(peer, name).detach().numpy() for name in names]
        return np.stack([row.T if transpose else row for row in rows])

    params = {
        "input_kernel": stacked("weight_ih", True),
        "hidden_kernel": stacked("weight_hh", True),
        "bias": stacked("bias_ih", False) + stacked("bias_hh", False),  # only the sum matters
    }
    lstm = Lstm(width, directions)
    shapes = jax.tree.map(lambda p: p.shape, lstm.init(jax.random.key(0), x)["params"])
    assert shapes == jax.tree.map(lambda p: p.shape, params)
    np.testing.assert_allclose(lstm.apply({"params": params}, x), expected, atol=1e-6)
