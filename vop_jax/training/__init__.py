"""The run: sharding, optimizer, step, checkpoints, loop. Never imports data."""
