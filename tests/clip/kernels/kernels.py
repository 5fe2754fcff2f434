"""The kernels of NVIDIA's GPUs, interpreted on a CPU."""

import functools

from vop_jax.clip.kernels import fused_attention, layer_norm


def interpret(monkeypatch) -> tuple[list, list]:
    """Lists to be filled: the shapes that attention packed, and layer norms' backward passes."""
    packed, backward = [], []
    attention, normalized = (
        functools.partial(fused_attention.attention, interpret=True),
        layer_norm.normalized,
    )

    def attend(*arguments):
        packed.append(arguments[0].shape)
        return attention(*arguments)

    def normalize(*arguments):
        backward.append(arguments[-1])
        return normalized(
            *arguments[:-1], {"plain": "plain", "kernel": "interpreted"}[backward[-1]]
        )

    monkeypatch.setattr(fused_attention, "attention", attend)
    monkeypatch.setattr(layer_norm, "normalized", normalize)
    return packed, backward
