"""What a run is: its keys with their defaults, and the sizes of CLIP. Never loads jax."""

from vop_jax.config.base import base_config as base_config
