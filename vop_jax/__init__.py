"""VoP, text-video co-operative prompt tuning (CVPR 2023), in JAX/Flax."""

__version__ = "0.1.0"
__all__ = ["UserError", "load"]


def __getattr__(name: str):
    # Lazy, so that data workers (`import vop_jax.data...`) start without loading jax.
    if name == "load":
        from vop_jax.inference.retriever import load

        return load
    if name == "UserError":
        from vop_jax.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
