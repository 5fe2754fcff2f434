"""Embeddings become numbers: losses, ranks, metrics. No model, no devices."""
