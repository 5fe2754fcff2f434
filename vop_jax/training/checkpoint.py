"""Checkpoints of the trainable state with orbax: atomic, pruned, verified when they are read.

A checkpoint holds the step, the trainable parameters and the optimizer's state. The position
in the data is the step itself (batch k is a function of the seed and k), as are the schedule
and all random numbers, so nothing else is needed to continue exactly.
"""

import json
import os
import posixpath
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from vop_jax.errors import UserError
from vop_jax.storage.files import sha256, walk
from vop_jax.training import hosts
from vop_jax.training.step import TrainState

DIGESTS = "digests.json"  # in a checkpoint: {file: SHA-256}, written before it gets its name


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: `hosts.preempted` counts on being the only one to call jax's function."""
        return False


class Checkpoints:
    """The folder `checkpoints/` of a workdir."""

    def __init__(self, workdir: str | os.PathLike, keep: int):
        """Opens the folder and removes what a kill left unfinished; `keep` checkpoints stay."""
        root = os.fspath(workdir) if "://" in str(workdir) else os.path.abspath(workdir)
        self._folder = epath.Path(root) / "checkpoints"

        def remove_unfinished() -> None:
            # orbax's own option removes them in a thread, which prints a traceback when a process
            # ends at once.
            for unfinished in self._folder.glob("*.orbax-checkpoint-tmp*"):
                unfinished.rmtree()

        hosts.on_first(remove_unfinished)
        # Asynchronous creation of folders that fails leaves threads that wait for minutes.
        asynchronous = ocp.AsyncOptions(
            post_finalization_callback=self._write_digests, create_directories_asynchronously=False
        )
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, async_options=asynchronous)
        self._manager = _Manager(self._folder, options=options)
        self._saving = 0  # the step

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves in the background; a step that is already saved is left alone."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.wait_until_finished()  # until then the digests of another step are written
        self._saving = step
        arguments = {
            "state": ocp.args.StandardSave(_as_tree(state)),
            "meta": ocp.args.JsonSave(meta),
        }
        self._manager.save(step, args=ocp.args.Composite(**arguments))

    def restore(
        self, like: TrainState, check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state that can be read, and its meta; None without any checkpoint.

        Newer checkpoints that cannot be read are renamed to `checkpoints/STEP.damaged`.

        Args:
            like: has the shapes, dtypes and placement that the state gets.
            check: called with the meta of a state before the state is read; may raise.

        Raises:
            UserError: there are checkpoints, and none can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            damage, restored = hosts.on_first(partial(self._damage, step)), None
            try:
                if not damage:
                    restored = self._read(step, like, check)
            except (UserError, PermissionError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # these are no sign of damage
            except Exception as error:  # orbax has many for damaged files without digests
                damage = " ".join(f"{type(error).__name__}: {error}".split())[:100]
                # With intact files the state is another run's. And where each of several processes
                # reads a part, the others may have read theirs.
                if jax.process_count() > 1 or (self._folder / str(step) / DIGESTS).exists():
                    raise UserError(
                        f"{self._folder}/{step}: cannot be read ({damage}); rename that folder to "
                        f"{step}.damaged to continue from the one before"
                    ) from error
            if restored is not None:
                self._set_aside(damaged, step)
                return restored
            damaged[step] = damage
        if damaged:
            steps = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
            raise UserError(
                f"{self._folder}: no checkpoint can be read ({steps}); delete that folder to start "
                "over, or use another --workdir"
            )
        return None

    def wait(self) -> None:
        """Waits until everything is on disk; raises the error of a save in the background."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()

    def _read(
        self, step: int, like: TrainState, check: Callable[[dict[str, Any]], None]
    ) -> tuple[TrainState, dict[str, Any]]:
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=arguments)["meta"]
        check(meta)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(like))
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return TrainState(**self._manager.restore(step, args=arguments)["state"]), meta

    def _write_digests(self) -> None:
        """Called by orbax in its thread when all files are written."""
        if not hosts.is_first():
            return
        # On a disk the folder gets its final name afterwards, in a bucket it already has it.
        unfinished = list(self._folder.glob("*.orbax-checkpoint-tmp*"))
        for folder in unfinished or [self._folder / str(self._saving)]:
            names = (
                posixpath.join(item, inside, name)
                for item in ("state", "meta")
                for inside, _, files in walk(folder / item)
                for name in files
            )
            digests = {name: sha256(folder / name) for name in names}
            (folder / DIGESTS).write_text(json.dumps(digests, indent=1))

    def _damage(self, step: int) -> str:
        """The first file of a checkpoint that is missing or changed; "" without one."""
        folder = self._folder / str(step)
        if not (folder / DIGESTS).exists():  # written by an older version
            return ""
        try:
            digests = dict(json.loads((folder / DIGESTS).read_bytes()))
        except (ValueError, TypeError):
            return f"{DIGESTS} is not as it was written"
        for name, digest in digests.items():
            if not (folder / name).exists():
                return f"{name} is missing"
            if sha256(folder / name) != digest:
                return f"{name} is not as it was written"
        return ""

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        def rename() -> None:
            for step in damaged:
                aside = self._folder / f"{step}.damaged"
                if aside.exists():
                    aside.rmtree()
                (self._folder / str(step)).rename(aside)

        if not damaged:
            return
        for step, damage in damaged.items():
            logging.warning(
                "%s: the checkpoint of step %d is damaged (%s) and set aside; step %d is used",
                *(self._folder, step, damage, used),
            )
        hosts.on_first(rename)
        self._manager.reload()


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
