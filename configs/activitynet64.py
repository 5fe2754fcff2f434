"""ActivityNet Captions with 64 frames of each video; the paper takes 12.

    vop prepare --dataset=activitynet --frames=64 --videos=VIDEOS \
        --annotations=ANNOTATIONS --output=records/activitynet64
    vop check --config=activitynet64:vop_f+c \
        --config.data.records=records/activitynet64
    vop train --config=activitynet64:vop_f+c \
        --workdir=runs/activitynet64/vop_f+c --config.init.clip=clip.safetensors \
        --config.data.records=records/activitynet64

Sizes: see `activitynet.py`.
"""

import pathlib
import runpy

TWELVE = runpy.run_path(str(pathlib.Path(__file__).with_name("activitynet.py")))


def get_config(method: str = "vop"):
    c = TWELVE["get_config"](method)
    c.data.frames = 64
    return c
