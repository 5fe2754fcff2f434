"""VATEX, English captions, ten a video. Not in the paper.

    vop prepare --dataset=vatex --videos=VIDEOS \
        --annotations=ANNOTATIONS --output=records/vatex
    vop check --config=vatex:vop_f+c \
        --config.data.records=records/vatex
    vop train --config=vatex:vop_f+c \
        --workdir=runs/vatex/vop_f+c --config.init.clip=clip.safetensors \
        --config.data.records=records/vatex

Sizes: 25,991 videos is the usual training list, not checked here; lists differ in which videos
were still to be had.
"""

from vop_jax.config import base_config


def get_config(method: str = "vop"):
    c = base_config()
    c.method.name = method
    c.data.kind = "vatex"
    c.data.frames = 12
    # A run counts the captions that say left or right; --config.data.flip=False to be safe.
    c.train.batch_size = 32
    c.train.steps = 5 * 25_991 * 10 // 32  # 5 epochs of all captions
    c.train.checkpoint_every = 1000
    return c
