"""The embedded default: moving shapes, rendered here, over a tiny CLIP trained here.

Needs no download; a few minutes on two cores.
"""

from vop_jax.config import base_config

# The best of a sweep on the validation split, see docs/benchmarks/motion.md.
LEARNING_RATES = {
    "full": 1e-3,
    "bias": 3e-2,
    "proj": 3e-2,
    "partial": 1e-2,
    "adapter_attn": 3e-2,
    "adapter_ffn": 3e-2,
    "vop": 1e-2,
    "vop_p": 3e-2,
    "vop_c": 1e-2,
    "vop_f": 1e-1,
    "vop_f+p": 3e-2,
    "vop_f+c": 3e-2,
}


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
    c.train.learning_rate = LEARNING_RATES.get(method, 1e-2)
    c.train.checkpoint_every = 50
    c.eval.batch_size = 64
    c.compute.dtype = "float32"  # the same results on every machine
    return c
