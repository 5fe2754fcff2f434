"""The PyTorch side of `benchmarks.speed`: the same three programs, eager or compiled."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.torch_vop import TorchVop
from benchmarks.torch_weights import load
from vop_jax.config.clip import ClipConfig
from vop_jax.tuning.methods import MethodConfig

WEIGHT_DECAY, CLIP_NORM, LEARNING_RATE = 0.2, 1.0, 5e-3


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(threads: int) -> None:
    """The same threads and precision as JAX."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, the default of XLA


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class TorchPrograms:
    """The programs of one method.

    Args:
        flat: the parameters of `vop_jax` by name.
        trained: the names of those that are trained.
        rows: "frames" uint8 [B, F, S, S, 3] and "ids" int32 [B, T].
    """

    def __init__(
        self,
        clip: ClipConfig,
        method: MethodConfig,
        dtype: str,
        flat: Mapping[str, np.ndarray],
        trained: list[str],
        rows: Mapping[str, np.ndarray],
    ):
        model = TorchVop(clip, method, getattr(torch, dtype))
        self.model = load(model, flat, trained).to(device())
        self.frames = torch.from_numpy(rows["frames"]).to(device())
        self.ids = torch.from_numpy(rows["ids"]).long().to(device())

    def program(self, what: str, mode: str | None, videos: int) -> Callable[[], Any]:
        """Of "forward", "step" or "evaluation".

        Args:
            mode: of torch.compile; None: eager.
            videos: of an evaluation.
        """

        def perhaps_compiled(function: Callable) -> Callable:
            return torch.compile(function, mode=mode) if mode else function

        if mode:
            torch._dynamo.reset()  # a function is recompiled eight times at most, over all methods
        if what == "step":
            return self._step(perhaps_compiled(self.model.loss))
        if what == "forward":
            return self._forward(perhaps_compiled(self.model.loss))
        video, text = self.model.encode_video, self.model.encode_text
        return self._evaluation(perhaps_compiled(video), perhaps_compiled(text), videos)

    def _forward(self, loss_of: Callable) -> Callable[[], Any]:
        @torch.no_grad()
        def forward():
            return loss_of(self.frames, self.ids)

        return forward

    def _step(self, loss_of: Callable) -> Callable[[], Any]:
        trained = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        bare = [p for k, p in trained.items() if k.endswith("bias") or ".ln_" in k or p.ndim == 0]
        others = [p for p in trained.values() if not any(p is q for q in bare)]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": bare, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        parameters = list(trained.values())

        def step():
            loss = loss_of(self.frames, self.ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    def _evaluation(self, video: Callable, text: Callable, videos: int) -> Callable[[], Any]:
        batches = videos // len(self.frames)

        @torch.no_grad()
        def evaluation():
            # Cloned: with CUDA graphs, the next call overwrites what this one returned.
            text_rows = torch.cat([text(self.ids).clone() for _ in range(batches)])
            video_rows = torch.cat([video(self.frames).clone() for _ in range(batches)])
            similar = text_rows @ video_rows.T
            own = similar.diagonal()[:, None]
            return [
                1 + (s > own).sum(1) + ((s == own).sum(1) - 1) / 2 for s in (similar, similar.T)
            ]

        return evaluation

    def bytes_held(self) -> int:
        """Of parameters and rows."""
        tensors = [*self.model.parameters(), self.frames, self.ids]
        return sum(x.numel() * x.element_size() for x in tensors)


class PeakBytes:
    """The most memory that a program took: `before` it is made, then when it `ran`."""

    def __init__(self, held: int):
        self.others = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.others = torch.cuda.memory_allocated() - held

    def ran(self) -> int | None:
        """None on a CPU, which does not count."""
        if not torch.cuda.is_available():
            return None
        return torch.cuda.max_memory_allocated() - self.others


def matmul(size: int, dtype: str) -> Callable[[], Any]:
    """A product of two matrices [size, size]."""
    left, right = (torch.randn(size, size, device=device()).to(getattr(torch, dtype)) for _ in "ab")
    return lambda: left @ right
