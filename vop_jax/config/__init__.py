"""What a run is: its keys with their defaults, and the sizes of CLIP. Never loads jax."""
