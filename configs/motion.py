"""The motion benchmark's full setting: the demo's clips, a larger CLIP, more steps.

For an accelerator, or for hours on a CPU; `benchmarks/ladder.py` runs all methods of it.
"""

import pathlib
import runpy

DEMO = runpy.run_path(str(pathlib.Path(__file__).with_name("demo.py")))


def get_config(method: str = "vop"):
    c = DEMO["get_config"](method)  # learning rates too: this size has had no sweep of its own
    c.clip.arch = "small"  # 32 px, 6 + 4 layers of width 128
    c.data.rendered = 3072  # four clips of each caption: fewer are learnt by heart
    c.data.device_cache_gb = 1.0  # an accelerator takes clips faster than a host decodes them
    c.pretrain.steps = 600
    c.train.steps = 2000
    c.train.checkpoint_every = 250
    return c
