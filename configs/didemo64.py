"""DiDeMo with 64 frames of each video; the paper takes 12.

    vop prepare --dataset=didemo --frames=64 --videos=VIDEOS \
        --annotations=ANNOTATIONS --output=records/didemo64
    vop check --config=didemo64:vop_f+c \
        --config.data.records=records/didemo64
    vop train --config=didemo64:vop_f+c \
        --workdir=runs/didemo64/vop_f+c --config.init.clip=clip.safetensors \
        --config.data.records=records/didemo64

Sizes: see `didemo.py`.
"""

import pathlib
import runpy

TWELVE = runpy.run_path(str(pathlib.Path(__file__).with_name("didemo.py")))


def get_config(method: str = "vop"):
    c = TWELVE["get_config"](method)
    c.data.frames = 64
    return c
