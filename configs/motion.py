"""The motion benchmark's full setting: the demo's clips, a larger CLIP, trained to convergence.

For an accelerator, or for hours on a CPU; `benchmarks/ladder.py` runs all methods of it.
"""

from vop_jax.config import base_config

# Those of the demo's sweep; this size has had none of its own.
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
    c.clip.arch = "small"  # 32 px, 6 + 4 layers of width 128
    c.data.kind = "clips"
    c.data.frames = 8
    c.data.short_side = 32
    c.data.augment = False  # captions tell left from right, and where
    c.data.threads = 2
    c.pretrain.steps = 600
    c.train.steps = 1000
    c.train.batch_size = 128
    c.train.learning_rate = LEARNING_RATES.get(method, 1e-2)
    c.train.checkpoint_every = 100
    c.eval.batch_size = 64
    return c
