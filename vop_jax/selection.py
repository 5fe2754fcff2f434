"""Which step's parameters are the result: the last's, or the best on a validation split."""

import dataclasses
import json
from typing import Any

from absl import logging

from vop_jax import start
from vop_jax.errors import UserError
from vop_jax.storage import files
from vop_jax.training import hosts, sharding
from vop_jax.tuning.prompts_file import PromptSet, load_prompts, save_prompts

VALIDATION = "val_"  # begins the names of what is measured on the validation split
BEST_FILE, BEST_NOTE = "best.safetensors", "best.json"

HOW_VIDEOS_ARE_READ = ("frames", "sampling", "short_side", "stored_fps", "folder_fps")

Results = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The best parameters so far, kept in the workdir; without effect unless configured."""

    run: start.Run

    @property
    def active(self) -> bool:
        return self.run.config.train.select == "best"

    @property
    def prefix(self) -> str:
        """Begins the names of what is measured during training: the selection's, if it has any."""
        return VALIDATION if self.active else ""

    def reset(self) -> None:
        """Forgets what an attempt that was started over has left."""

        def forget() -> None:
            for name in (BEST_NOTE, BEST_FILE):
                (self.run.workdir / name).unlink(missing_ok=True)

        hosts.on_first(forget)

    def consider(self, trainable: Any, step: int, results: Results) -> None:
        """Keeps these parameters if they are better than all before; of equals, the first."""
        score = (results["t2v"]["R@1"] + results["v2t"]["R@1"]) / 2
        best = self._kept()
        # The same step again: the run was cut off between this and its next checkpoint.
        if best is not None and score <= best["score"] and step != best["step"]:
            return
        save_result(self.run, trainable, BEST_FILE)
        note = {"split": self.run.config.data.val_split, "step": step, "score": score}
        hosts.on_first(lambda: files.write_json(self.run.workdir / BEST_NOTE, note))
        logging.info("best on %s so far: step %d, mean R@1 %.1f", note["split"], step, score)

    def chosen(self) -> dict[str, Any] | None:
        """{"split", "step", "score"} of the best, if this run has one."""
        # What lies beside a run without progress is an abandoned attempt's.
        return self._kept() if int(self.run.state.step) else None

    def _kept(self) -> dict[str, Any] | None:
        path = self.run.workdir / BEST_NOTE
        if not self.active:
            return None

        def read() -> dict[str, Any] | None:
            if not path.exists():
                return None
            try:
                note = json.loads(path.read_bytes())
                return {key: note[key] for key in ("split", "step", "score")}
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{path}: damaged; delete {BEST_NOTE} and {BEST_FILE} to go on without the "
                    "best step so far"
                ) from None

        return hosts.on_first(read)

    def trainable(self) -> Any:
        """The chosen parameters, or those of the newest step."""
        if self.chosen() is None:
            return self.run.state.trainable
        return load_prompts(self.run.workdir / BEST_FILE).params


def prompt_set(run: start.Run, trainable: Any) -> PromptSet:
    """Trained parameters, on this machine, with all that is needed to use them.

    Every process of the run has to ask for it.
    """
    data = run.config.data
    return PromptSet(
        params=sharding.to_host(trainable),
        method=run.method,
        clip_fingerprint=run.clip.fingerprint,
        clip_name=run.clip.name,
        clip_config=run.clip.config,
        video={key: data[key] for key in HOW_VIDEOS_ARE_READ},
    )


def save_result(run: start.Run, trainable: Any, name: str) -> str:
    """Writes trained parameters with all that is needed to use them; returns the path."""
    path = run.workdir / name
    found = prompt_set(run, trainable)
    hosts.on_first(lambda: save_prompts(path, **vars(found)))
    logging.info("wrote %s", path)
    return str(path)
