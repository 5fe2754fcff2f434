"""What blocks keep for the backward pass: less, for computing it again.

A block as a function of its own parameters, so that `jax.checkpoint` and `lax.map` apply to it as
they are; parameters and their names stay the same.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.layers import Beside, Block, Kernel, Reads

Remat = Literal["none", "dots", "full"]

# What of a block is kept beside its input. The products with weights are those without batch
# dimensions; attention's, which are large and cheap, are not among them.
POLICIES: dict[str, Callable[..., bool]] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """How much memory blocks may take.

    Attributes:
        remat: what is computed again in the backward pass: nothing ("none"), all but products
            with weights ("dots"), all but what enters a block ("full").
        frame_chunk: at most so many frames are in a vision block at a time, and each such chunk
            is computed again in the backward pass; 0: all frames at once.
    """

    remat: Remat = "none"
    frame_chunk: int = 0

    def run(
        self,
        block: Block,
        x: jax.Array,
        branches: Mapping[str, nn.Module],
        beside: Beside | None = None,
        kernel: Kernel = "xla",
        frames: bool = False,
        reads: Reads = None,
    ) -> jax.Array:
        """`block(x, **branches, …)`, [N, T, D] -> [N, R, D].

        Args:
            frames: whether the N sequences are frames, which `frame_chunk` is about.
        """
        chunks = self.chunks(len(x)) if frames and self.frame_chunk else 1
        if block.is_initializing() or (chunks == 1 and self.remat == "none"):
            return block(x, **branches, beside=beside, kernel=kernel, reads=reads)
        function, params = _pure(block, branches, kernel, reads)
        if chunks == 1:
            return jax.checkpoint(function, policy=POLICIES[self.remat])(params, x, beside)
        # Within a loop nothing is merged with the forward pass, so nothing needs preventing.
        again = jax.checkpoint(function, prevent_cse=False)
        # Their gradients are joined, too: read late, those of `beside` keep the other of every
        # loop in a TPU's memory, a third of all it takes at ViT-L/14.
        x, beside = jax.lax.optimization_barrier((x, beside))
        if beside is None or len(beside.tokens) == 1:
            rows = jax.lax.map(lambda x: again(params, x, beside), split_rows(x, chunks))
        else:  # each frame takes its own tokens along
            tokens = jnp.tile(beside.tokens, (len(x) // len(beside.tokens), 1, 1))
            parts = split_rows(x, chunks), split_rows(tokens, chunks)
            rows = jax.lax.map(lambda part: again(params, part[0], Beside(part[1])), parts)
        return join_rows(rows)

    def chunks(self, count: int) -> int:
        """Into how many equal parts `count` frames are cut: as few as `frame_chunk` allows."""
        limit = self.frame_chunk or count
        return next(k for k in range(1, count + 1) if count % k == 0 and count // k <= limit)


def _pure(
    block: Block, branches: Mapping[str, nn.Module], kernel: Kernel, reads: Reads
) -> tuple[Callable[..., jax.Array], dict]:
    """(function, params): function(params, x, beside) is what the block with its branches does."""
    modules: dict[str, nn.Module] = {"block": block, **branches}
    free: dict[str, Any] = {name: module.clone(parent=None) for name, module in modules.items()}

    def function(params, x, beside):
        own = {name: partial(free[name].apply, params[name]) for name in branches}
        options = {"beside": beside, "kernel": kernel, "reads": reads}
        return free["block"].apply(params["block"], x, **own, **options)

    return function, {name: module.variables for name, module in modules.items()}


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[N, ...] -> [parts, N / parts, ...]; part i is rows i, i + parts, i + 2 parts, …

    So each device, which holds a run of rows, has its share of every part and none moves.
    """
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def join_rows(x: jax.Array) -> jax.Array:
    """[parts, N / parts, ...] -> [N, ...], the inverse of `split_rows`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
