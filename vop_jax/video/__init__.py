"""A video file becomes frames. Never loads jax."""
