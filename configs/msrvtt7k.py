"""MSR-VTT, 7,010 videos to train on, tested on 1k-A: 1,000 captions x 1,000 videos.

    vop prepare --dataset=msrvtt7k --videos=VIDEOS \
        --annotations=ANNOTATIONS --output=records/msrvtt7k
    vop check --config=msrvtt7k:vop_f+c \
        --config.data.records=records/msrvtt7k
    vop train --config=msrvtt7k:vop_f+c \
        --workdir=runs/msrvtt7k/vop_f+c --config.init.clip=clip.safetensors \
        --config.data.records=records/msrvtt7k

Sizes: the lines of MSRVTT_train.7k.csv, 20 captions each, and of MSRVTT_JSFUSION_test.csv.
"""

from vop_jax.config import base_config


def get_config(method: str = "vop"):
    c = base_config()
    c.method.name = method
    c.data.kind = "msrvtt7k"
    c.data.frames = 12
    # Left and right: in none of the 1,000 test captions; flips stay on.
    c.train.batch_size = 32
    c.train.steps = 5 * 140_200 // 32  # 5 epochs of all captions
    c.train.checkpoint_every = 1000
    return c
