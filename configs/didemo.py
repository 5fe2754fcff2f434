"""DiDeMo: paragraphs, the first 30 seconds; tested on 1,004 paragraphs x 1,004 videos.

    vop prepare --dataset=didemo --videos=VIDEOS \
        --annotations=ANNOTATIONS --output=records/didemo
    vop check --config=didemo:vop_f+c \
        --config.data.records=records/didemo
    vop train --config=didemo:vop_f+c \
        --workdir=runs/didemo/vop_f+c --config.init.clip=clip.safetensors \
        --config.data.records=records/didemo

Sizes: those of the usual lists; 8,395 is the published training set, lists in use lack a few.
"""

from vop_jax.config import base_config


def get_config(method: str = "vop"):
    c = base_config()
    c.method.name = method
    c.data.kind = "didemo"
    c.data.frames = 12
    c.data.flip = False  # moments are told apart by where things are
    c.train.batch_size = 32
    c.train.steps = 5 * 8_395 // 32  # 5 epochs of all paragraphs
    c.train.checkpoint_every = 200
    return c
