"""MSVD: 1,200 videos to train on; tested on 27,763 captions x 670 videos. Not in the paper.

    vop prepare --dataset=msvd --videos=VIDEOS \
        --annotations=ANNOTATIONS --output=records/msvd
    vop check --config=msvd:vop_f+c \
        --config.data.records=records/msvd
    vop train --config=msvd:vop_f+c \
        --workdir=runs/msvd/vop_f+c --config.init.clip=clip.safetensors \
        --config.data.records=records/msvd

Sizes: the videos of the three lists, with all their captions.
"""

from vop_jax.config import base_config


def get_config(method: str = "vop"):
    c = base_config()
    c.method.name = method
    c.data.kind = "msvd"
    c.data.frames = 12
    # Left or right in 0.09 % of all captions; flips go off from 1 %.
    c.train.batch_size = 32
    c.train.steps = 5 * 48_774 // 32  # 5 epochs of all captions
    c.train.checkpoint_every = 1000
    return c
