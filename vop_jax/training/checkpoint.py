"""Checkpoints of the trainable state with orbax: atomic, pruned, checked on the way back.

A checkpoint holds the step, the trainable parameters and the optimizer's state. The position
in the data is the step itself (batch k is a function of the seed and k), as are the schedule
and all random numbers, so nothing else is needed to continue exactly.
"""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from vop_jax.training import hosts
from vop_jax.training.step import TrainState


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: `hosts.preempted` asks that, and counts on nobody else asking jax."""
        return False


class Checkpoints:
    """The folder `checkpoints/` of a workdir."""

    def __init__(self, workdir: str | os.PathLike, keep: int):
        root = os.fspath(workdir) if "://" in str(workdir) else os.path.abspath(workdir)
        folder = epath.Path(root) / "checkpoints"

        def clean() -> None:
            # What a kill left behind: an unfinished save is not a checkpoint. (orbax's own option
            # does this in a thread, which a process that ends at once cuts off with a traceback.)
            for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
                unfinished.rmtree()

        hosts.on_first(clean)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = _Manager(folder, options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves in the background; a step that is already saved is left alone."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_tree(state)), meta=ocp.args.JsonSave(meta)
            ),
        )

    def meta(self) -> dict[str, Any]:
        """What was saved beside the newest state."""
        step = self._manager.latest_step()
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, with the shapes, dtypes and placement of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(like))
        restored = self._manager.restore(
            self._manager.latest_step(),
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
        )["state"]
        return TrainState(**restored)

    def wait(self) -> None:
        """Until everything is on disk; raises what a background save met."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
