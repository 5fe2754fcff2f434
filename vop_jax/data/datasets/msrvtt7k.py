"""MSR-VTT with the smaller training list, tested on 1k-A too."""

from vop_jax.data.datasets.msrvtt9k import benchmark

DATASET = benchmark("msrvtt7k", "MSR-VTT-7k, test 1k-A", "MSRVTT_train.7k.csv", 7010)
