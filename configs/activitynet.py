"""ActivityNet Captions: paragraphs, whole videos; tested on val_1, 4,917 x 4,917.

    vop prepare --dataset=activitynet --videos=VIDEOS \
        --annotations=ANNOTATIONS --output=records/activitynet
    vop check --config=activitynet:vop_f+c \
        --config.data.records=records/activitynet
    vop train --config=activitynet:vop_f+c \
        --workdir=runs/activitynet/vop_f+c --config.init.clip=clip.safetensors \
        --config.data.records=records/activitynet

Sizes: the videos of train.json and val_1.json.
"""

from vop_jax.config import base_config


def get_config(method: str = "vop"):
    c = base_config()
    c.method.name = method
    c.data.kind = "activitynet"
    c.data.frames = 12
    # Left or right in 3.5 % of val_1's paragraphs, as sides in 23 of 30 looked at; off from 1 %.
    c.data.flip = False
    c.train.batch_size = 32
    c.train.steps = 5 * 10_009 // 32  # 5 epochs of all paragraphs
    c.train.checkpoint_every = 200
    return c
