"""configs/demo.py as scenic writes it, for python -m vop_jax.interop.scenic.

scenic's names where it has one, ours for the rest: see docs/guides/scenic.md.
"""

from ml_collections import ConfigDict


def get_config(method: str = "vop"):
    c = ConfigDict()
    c.experiment_name = f"demo_{method}"
    c.rng_seed = 0

    c.dataset_name = "vop_jax"
    c.data_dtype_str = "uint8"
    c.dataset_configs = ConfigDict()
    c.dataset_configs.kind = "clips"  # rendered into the workdir
    c.dataset_configs.num_frames = 8
    c.dataset_configs.min_resize = 32
    c.dataset_configs.augment = False
    c.dataset_configs.threads = 2

    c.model_dtype_str = "float32"
    c.clip = ConfigDict({"arch": "tiny"})
    c.pretrain = ConfigDict({"steps": 450})
    c.method = ConfigDict({"name": method})

    c.num_training_steps = 150
    c.batch_size = 128
    c.eval_batch_size = 64
    c.optimizer = "adamw"
    c.optimizer_configs = ConfigDict({"weight_decay": 0.2})
    c.max_grad_norm = 1.0
    c.lr_configs = ConfigDict()
    c.lr_configs.learning_rate_schedule = "compound"
    c.lr_configs.factors = "constant*linear_warmup*cosine_decay"
    c.lr_configs.base_learning_rate = 1e-2  # vop's; of other methods in configs/demo.py
    c.lr_configs.warmup_steps = 15
    c.lr_configs.total_steps = 150
    c.lr_configs.steps_per_cycle = 150

    c.log_summary_steps = 20
    c.checkpoint = True
    c.checkpoint_steps = 50
    return c
