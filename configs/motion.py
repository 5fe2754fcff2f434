"""The motion benchmark's full setting: the demo's clips, a larger CLIP, more steps.

For an accelerator, or for hours on a CPU; `benchmarks/ladder.py` runs all methods of it.
"""

import pathlib
import runpy

# The best of a sweep on the validation split, or one within half a point of it:
# docs/benchmarks/motion.md.
LEARNING_RATES = {
    "full": 3e-4,
    "bias": 1e-1,
    "proj": 1e-2,
    "partial": 3e-3,
    "adapter_attn": 1e-1,
    "adapter_ffn": 1e-2,
    "vop": 1e-2,
    "vop_p": 1e-2,
    "vop_c": 1e-2,
    "vop_f": 1e-1,
    "vop_f+p": 3e-2,
    "vop_f+c": 1e-2,
}

# `vop_f` has one table of frames to find the order by, and takes longer; with weight decay at that
# rate the table stays small and a run's end is a matter of luck, see docs/benchmarks/motion.md.
OWN = {"vop_f": {"steps": 3000, "weight_decay": 0.0}}

DEMO = runpy.run_path(str(pathlib.Path(__file__).with_name("demo.py")))


def get_config(method: str = "vop"):
    c = DEMO["get_config"](method)
    c.clip.arch = "small"  # 32 px, 6 + 4 layers of width 128
    c.data.rendered = 3072  # four clips of each caption; one of each was learnt by heart
    c.data.device_cache_gb = 1.0  # an accelerator takes clips faster than a host decodes them
    c.pretrain.steps = 600
    c.train.steps = 1000
    c.train.learning_rate = LEARNING_RATES.get(method, 1e-2)
    c.train.update(OWN.get(method, {}))
    c.train.checkpoint_every = 250
    return c
