"""The motion benchmark's full setting: the demo's clips, a larger CLIP, trained to convergence.

For an accelerator, or for hours on a CPU; `benchmarks/ladder.py` runs all methods of it.
"""

from vop_jax.config import base_config


def get_config(method: str = "vop"):
    c = base_config()
    c.method.name = method
    c.clip.arch = "small"  # 32 px, 6 + 4 layers of width 128
    c.data.kind = "clips"
    c.data.frames = 8
    c.data.short_side = 32
    c.data.augment = False  # captions tell left from right, and where
    c.data.threads = 2
    c.pretrain.steps = 600
    c.train.steps = 1000
    c.train.batch_size = 64
    c.train.learning_rate = 1e-2
    c.train.checkpoint_every = 100
    c.eval.batch_size = 64
    return c
