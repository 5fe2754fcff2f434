"""An independent VoP in PyTorch, for comparison: it reads a released state dict directly.

Written from the description of the method, with explicit loops over captions where that is the
plainest; imports nothing of the package under test.
"""

import torch
from torch.nn import functional as F

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
SUFFIXES = ("released", "eot")


class ReferenceVop:
    """The released model over `{"module.clip.…": tensor, …}`, float32."""

    def __init__(self, state: dict[str, torch.Tensor], suffix: str = "released"):
        if suffix not in SUFFIXES:
            raise ValueError(suffix)
        self.state = {name: tensor.float() for name, tensor in state.items()}
        self.suffix_mode = suffix
        self.visual_prompts = self.state["module.visual_prompt_learner.visual_prompts"]
        text = self.state["module.text_prompt_learner.text_prompts"]
        half = text.shape[1] // 2
        self.prefix, self.suffix = text[:, :half], text[:, half:]

    def clip(self, name: str) -> torch.Tensor:
        return self.state[f"module.clip.{name}"]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.clip(f"{name}.weight"), self.clip(f"{name}.bias")
        return F.layer_norm(x, weight.shape, weight, bias, eps=1e-5)

    def block(self, name: str, x: torch.Tensor, causal: bool) -> torch.Tensor:
        """Pre-norm block [N, T, D] -> [N, T, D]."""

        def linear(layer, h):
            return F.linear(
                h, self.clip(f"{name}.{layer}.weight"), self.clip(f"{name}.{layer}.bias")
            )

        n, t, d = x.shape
        heads = max(1, d // 64)
        packed = F.linear(
            self.norm(f"{name}.ln_1", x),
            self.clip(f"{name}.attn.in_proj_weight"),
            self.clip(f"{name}.attn.in_proj_bias"),
        )
        q, k, v = packed.reshape(n, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (d // heads) ** 0.5  # [N, H, T, T]
        if causal:
            scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d)
        x = x + linear("attn.out_proj", mixed)
        h = linear("mlp.c_fc", self.norm(f"{name}.ln_2", x))
        return x + linear("mlp.c_proj", h * torch.sigmoid(1.702 * h))

    @torch.no_grad()
    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [B, F, S, S, 3] -> mean of the unit frame features [B, E], not normalised."""
        pixels = frames.float() / 255
        pixels = (pixels - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        images = pixels.flatten(0, 1).permute(0, 3, 1, 2)
        kernel = self.clip("visual.conv1.weight")
        patches = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        cls = self.clip("visual.class_embedding").expand(len(images), 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.clip("visual.positional_embedding")
        count = self.visual_prompts.shape[2]
        for layer, prompts in enumerate(self.visual_prompts):  # [1, P, D]
            x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
            if layer == 0:
                x = self.norm("visual.ln_pre", x)
            x = self.block(f"visual.transformer.resblocks.{layer}", x, causal=False)
            x = torch.cat([x[:, :1], x[:, 1 + count :]], dim=1)
        features = self.norm("visual.ln_post", x[:, 0]) @ self.clip("visual.proj")
        return F.normalize(features, dim=-1).unflatten(0, frames.shape[:2]).mean(dim=1)

    @torch.no_grad()
    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """int [N, slots] -> unit rows [N, E]; one caption after the other."""
        return torch.cat([self._encode_caption(row) for row in ids.long()])

    def _encode_caption(self, ids: torch.Tensor) -> torch.Tensor:
        eot = int(ids.argmax())
        at = eot if self.suffix_mode == "eot" else len(ids) - 1  # right after the suffix
        x = self.clip("token_embedding.weight")[ids]  # [slots, D]
        first, added = self.prefix.shape[1], self.prefix.shape[1] + self.suffix.shape[1]
        for layer, (prefix, suffix) in enumerate(zip(self.prefix, self.suffix, strict=True)):
            x = torch.cat([x[:1], prefix, x[1:at], suffix, x[at:]])
            if layer == 0:
                x = x + self.clip("positional_embedding")
            x = self.block(f"transformer.resblocks.{layer}", x[None], causal=True)[0]
            if layer + 1 < len(self.prefix):
                x = torch.cat([x[:1], x[1 + first : first + at], x[added + at :]])
        feature = self.norm("ln_final", x[eot + added]) @ self.clip("text_projection")
        return F.normalize(feature[None], dim=-1)
