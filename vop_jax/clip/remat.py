"""Rematerialization: blocks keep less for the backward pass and compute it again.

`Remat.apply` turns a block into a function of its own parameters, so that `jax.checkpoint` and
`lax.map` apply to it as they are; parameters and their names stay the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.kernels import products
from vop_jax.clip.layers import Block, Kernel, PromptTokens, QueryPositions

RematPolicy = Literal["none", "dots", "full"]

# What a block keeps besides its input. Attention's products are large and cheap.
POLICIES: dict[str, Callable[..., bool]] = {
    "dots": jax.checkpoint_policies.save_only_these_names(products.WITH_WEIGHTS),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Remat:
    """How much memory blocks may take for the backward pass.

    Attributes:
        policy: what the backward pass computes again: nothing ("none"), all but products with
            weights ("dots"), all but the input of a block ("full").
        frame_chunk: the most frames that a vision block processes at a time; each chunk is
            computed again in the backward pass. 0: all frames at once.
    """

    policy: RematPolicy = "none"
    frame_chunk: int = 0

    def apply(
        self,
        block: Block,
        x: jax.Array,
        branches: Mapping[str, nn.Module],
        prompts: PromptTokens | None = None,
        kernel: Kernel = "xla",
        frames: bool = False,
        query_positions: QueryPositions = None,
    ) -> jax.Array:
        """`block(x, **branches, …)`, [N, T, D] -> [N, Q, D].

        Args:
            branches: `attn_branch` or `mlp_branch` of the block.
            frames: whether the N sequences are frames, to which `frame_chunk` applies.
        """
        chunks = self.chunk_count(len(x)) if frames and self.frame_chunk else 1
        if block.is_initializing() or (branches and chunks == 1 and self.policy == "none"):
            return block(
                x, **branches, prompts=prompts, kernel=kernel, query_positions=query_positions
            )
        if chunks == 1 and self.policy == "none":
            count = query_positions if isinstance(query_positions, int) else None
            run = _traced_once(block.clone(parent=None, name=None), kernel, count)
            return run(block.variables, x, prompts, None if count else query_positions)
        function, params = _pure(block, branches, kernel, query_positions)
        if chunks == 1:
            return jax.checkpoint(function, policy=POLICIES[self.policy])(params, x, prompts)
        # Inside a loop, common subexpressions of the forward pass cannot be merged anyway.
        recomputed = jax.checkpoint(function, prevent_cse=False)
        # The barrier also joins the two gradients: a late use of the prompts' gradient would keep
        # that of x of every loop in a TPU's memory, a third of all it takes at ViT-L/14.
        x, prompts = jax.lax.optimization_barrier((x, prompts))
        if prompts is None or len(prompts.tokens) == 1:
            rows = jax.lax.map(lambda x: recomputed(params, x, prompts), split_rows(x, chunks))
        else:  # each frame takes its own prompts along
            tokens = jnp.tile(prompts.tokens, (len(x) // len(prompts.tokens), 1, 1))
            parts = split_rows(x, chunks), split_rows(tokens, chunks)
            rows = jax.lax.map(lambda p: recomputed(params, p[0], PromptTokens(p[1])), parts)
        return join_rows(rows)

    def chunk_count(self, frames: int) -> int:
        """The fewest equal chunks of `frames` frames that `frame_chunk` allows."""
        limit = self.frame_chunk or frames
        return next(k for k in range(1, frames + 1) if frames % k == 0 and frames // k <= limit)


@functools.cache
def _traced_once(block: Block, kernel: Kernel, count: int | None) -> Callable[..., jax.Array]:
    """The function (params, x, prompts, query positions) of all blocks of one kind.

    Twelve traces would take a quarter of the time to compile. The compiler inlines the function.

    Args:
        count: the query positions if they are a number, in place of the function's argument.
    """

    def run_block(
        params: Any, x: jax.Array, prompts: PromptTokens | None, positions: jax.Array | None
    ) -> jax.Array:
        at = count or positions
        out: Any = block.apply(params, x, prompts=prompts, kernel=kernel, query_positions=at)
        return out

    return jax.jit(run_block)


def _pure(
    block: Block, branches: Mapping[str, nn.Module], kernel: Kernel, positions: QueryPositions
) -> tuple[Callable[..., jax.Array], dict]:
    """(function, params) of a block: function(params, x, prompts) is its output."""
    modules: dict[str, nn.Module] = {"block": block, **branches}
    unbound: dict[str, Any] = {name: module.clone(parent=None) for name, module in modules.items()}

    def function(params, x, prompts):
        own = {name: partial(unbound[name].apply, params[name]) for name in branches}
        options = {"prompts": prompts, "kernel": kernel, "query_positions": positions}
        return unbound["block"].apply(params["block"], x, **own, **options)

    return function, {name: module.variables for name, module in modules.items()}


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[N, ...] -> [parts, N / parts, ...]; part i has the rows i, i + parts, i + 2 parts, …

    Each device holds consecutive rows, so it has its share of every part and no row moves.
    """
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def join_rows(x: jax.Array) -> jax.Array:
    """[parts, N / parts, ...] -> [N, ...], the inverse of `split_rows`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
