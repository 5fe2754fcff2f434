"""LSMDC: clips of films; tested on 1,000 captions x 1,000 clips.

    vop prepare --dataset=lsmdc --videos=VIDEOS \
        --annotations=ANNOTATIONS --output=records/lsmdc
    vop check --config=lsmdc:vop_f+c \
        --config.data.records=records/lsmdc
    vop train --config=lsmdc:vop_f+c \
        --workdir=runs/lsmdc/vop_f+c --config.init.clip=clip.safetensors \
        --config.data.records=records/lsmdc

Sizes: the lines of LSMDC16_annos_training.csv in its usual list (the paper speaks of 109,673)
and of LSMDC16_challenge_1000_publictect.csv.
"""

from vop_jax.config import base_config


def get_config(method: str = "vop"):
    c = base_config()
    c.method.name = method
    c.data.kind = "lsmdc"
    c.data.frames = 12
    # Left or right in 0.4 % of the test captions; flips go off from 1 %.
    c.train.batch_size = 32
    c.train.steps = 5 * 101_079 // 32  # 5 epochs of all captions
    c.train.checkpoint_every = 1000
    return c
