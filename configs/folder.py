"""Your own videos: a folder of files and a CSV or JSON Lines file of captions.

    vop train --config=folder --workdir=DIR \
        --config.init.clip=clip.safetensors \
        --config.data.annotations=captions.csv --config.data.videos=videos/
"""

from vop_jax.config import base_config


def get_config(method: str = "vop"):
    c = base_config()
    c.method.name = method
    return c
