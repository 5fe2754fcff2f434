"""The embedded default: moving shapes, rendered here, over a tiny CLIP trained here.

Needs no download; a few minutes on two cores.
"""

from vop_jax.config import base_config


def get_config(method: str = "vop"):
    c = base_config()
    c.method.name = method
    c.clip.arch = "tiny"  # 32 px, 4 + 3 layers of width 64
    c.data.kind = "clips"
    c.data.frames = 8
    c.data.short_side = 32
    c.data.augment = False  # captions tell left from right, and where
    c.data.threads = 2
    c.pretrain.steps = 450
    c.train.steps = 150
    c.train.batch_size = 128
    c.train.learning_rate = 1e-2
    c.train.checkpoint_every = 50
    c.eval.batch_size = 64
    return c
