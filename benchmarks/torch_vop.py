"""VoP in PyTorch, to compare with: the same features, loss and gradients, written the usual way.

Packed query/key/value, `scaled_dot_product_attention`, concatenated prompts, `nn.LSTM`. Nothing of
`vop_jax`'s models is used, only its configs; `torch_weights` fills it with a model's parameters.
Weights are cast to the compute dtype where they are used, which costs nothing for frozen ones that
are held in it: as under autocast, but without its float32 norms.
"""

import torch
from torch import nn
from torch.nn import functional as F

from vop_jax.config.clip import ClipConfig
from vop_jax.tuning.methods import MethodConfig

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class Linear(nn.Linear):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):  # statistics are float32 inside
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, 1e-5)


class Adapter(nn.Module):
    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down, self.up = Linear(width, bottleneck), Linear(bottleneck, width)

    def forward(self, x):
        return self.up(F.relu(self.down(x)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)

    def forward(self, x):
        n, t, d = x.shape
        packed = self.qkv(x).view(n, t, 3, self.heads, d // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [N, H, T, D/H]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(x.transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    def __init__(self, width: int, activation: str):
        super().__init__()
        self.quick = activation == "quick_gelu"
        self.c_fc, self.c_proj = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x):
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class Block(nn.Module):
    """Pre-norm [N, T, D] -> [N, T, D], perhaps with an adapter parallel to "attn" or "mlp"."""

    def __init__(self, width, heads, activation, causal, adapter: str, bottleneck: int):
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.mlp = Mlp(width, activation)
        self.adapter_place = adapter
        if adapter:
            self.adapter = Adapter(width, bottleneck)

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attn(h)
        if self.adapter_place == "attn":
            x = x + self.adapter(h)
        h = self.ln_2(x)
        x = x + self.mlp(h)
        return x + self.adapter(h) if self.adapter_place == "mlp" else x


class Vision(nn.Module):
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, c: ClipConfig, m: MethodConfig):
        super().__init__()
        w = c.vision_width
        self.conv1 = nn.Conv2d(3, w, c.patch_size, stride=c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(w))
        self.positional_embedding = nn.Parameter(torch.zeros(c.patches + 1, w))
        self.ln_pre, self.ln_post = LayerNorm(w), LayerNorm(w)
        rest = c.activation, False, m.parts.adapter, m.adapter_width
        self.blocks = nn.ModuleList(Block(w, c.vision_heads, *rest) for _ in range(c.vision_layers))
        self.proj = Linear(w, c.embed_dim, bias=False)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    def embed(self, frames: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [N, S, S, 3] -> [N, 1 + G, D]."""
        images = (frames.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        kernel = self.conv1.weight.to(dtype)
        x = F.conv2d(images.to(dtype), kernel, stride=self.conv1.stride)
        cls = self.class_embedding.to(dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x.flatten(2).transpose(1, 2)], dim=1)
        return x + self.positional_embedding.to(dtype)


class Text(nn.Module):
    def __init__(self, c: ClipConfig, m: MethodConfig):
        super().__init__()
        w = c.text_width
        self.token_embedding = nn.Embedding(c.vocab_size, w)
        self.positional_embedding = nn.Parameter(torch.zeros(c.context_length, w))
        rest = c.activation, True, m.parts.adapter, m.adapter_width
        self.blocks = nn.ModuleList(Block(w, c.text_heads, *rest) for _ in range(c.text_layers))
        self.ln_final = LayerNorm(w)
        self.proj = Linear(w, c.embed_dim, bias=False)


class Context(nn.Module):
    """CLS tokens of a clip's frames [B, F, D] -> prompts of each frame [B, F, P, D]."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_hh"):  # of its two biases only the sum matters: one is trained
                nn.init.zeros_(bias).requires_grad_(False)
        self.stretch = Linear(2 * width, tokens * width)

    def forward(self, cls):
        half = cls.dtype != torch.float32
        with torch.autocast(cls.device.type, cls.dtype, enabled=half):
            modulated, _ = self.lstm(cls)
        return self.stretch(modulated.to(cls.dtype)).unflatten(-1, (-1, cls.shape[-1]))


class Prompts(nn.Module):
    """What VoP trains, each where the method has it."""

    def __init__(self, c: ClipConfig, m: MethodConfig, split: int):
        super().__init__()
        self.split_layer, depth, width = split, c.vision_layers, c.vision_width
        own = m.specific_prompts if m.parts.specific else 0

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        self.text = table(c.text_layers, m.text_prefix + m.text_suffix, c.text_width)
        self.visual = table(split, m.visual_prompts - own, width)
        self.position = (
            table(split, m.frames, own, width) if m.parts.specific == "position" else None
        )
        self.context = Context(width, own) if m.parts.specific == "context" else None
        if split < depth:
            self.video = table(depth - split, m.visual_prompts, width)
            self.frame_position = table(m.frames, width)

    def of_frames(self, layer: int, cls: torch.Tensor) -> torch.Tensor:
        """The CLS tokens [B, F, D] -> [B * F, P, D]: generic prompts, then the frame's own."""
        batch, frames = cls.shape[:2]
        parts = [self.visual[layer].to(cls.dtype).expand(batch * frames, -1, -1)]
        if self.position is not None:
            own = self.position[layer].to(cls.dtype)
            parts.append(own.expand(batch, -1, -1, -1).flatten(0, 1))
        if self.context is not None:
            parts.append(self.context(cls).flatten(0, 1))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def of_clips(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """[B, P, D], for x [B, ..., D]."""
        return self.video[layer - self.split_layer].to(x.dtype).expand(len(x), -1, -1)


class TorchVop(nn.Module):
    """CLIP, and what a method adds to it.

    Args:
        dtype: of the computation.

    Raises:
        ValueError: prompts in some layers or one tower only, or another CMM than the paper's.
    """

    def __init__(self, c: ClipConfig, m: MethodConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        usual = ("branches", "first_layer", "last_layer", "frame_position", "cmm", "cmm_role")
        if any(getattr(m, key) != getattr(MethodConfig(), key) for key in (*usual, "suffix")):
            raise ValueError(f"the peer knows the default of {', '.join(usual)} and suffix only")
        self.dtype, self.prefix, self.suffix = dtype, m.text_prefix, m.text_suffix
        self.split_layer = m.resolved_split_layer(c.vision_layers)
        self.visual, self.text = Vision(c, m), Text(c, m)
        self.prompts = Prompts(c, m, self.split_layer) if m.parts.prompts else None
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [B, F, S, S, 3] -> float32 unit rows [B, E]."""
        batch, count = frames.shape[:2]
        x = self.visual.embed(frames.flatten(0, 1), self.dtype)  # [B * F, 1 + G, D]
        heads, present = 1, 0  # how many CLS tokens, then prompts, lead a sequence
        for layer, block in enumerate(self.visual.blocks):
            if self.prompts is not None and layer == self.split_layer:
                x = torch.cat([x[:, :1], x[:, 1 + present :]], dim=1).unflatten(0, (batch, count))
                x = x + self.prompts.frame_position.to(x.dtype)[:, None]
                x = torch.cat([x[:, :, 0], x[:, :, 1:].flatten(1, 2)], dim=1)
                heads, present = count, 0
            if self.prompts is not None:
                cls = x[:, :heads]
                if layer < self.split_layer:
                    own = self.prompts.of_frames(layer, cls.reshape(batch, count, -1))
                else:
                    own = self.prompts.of_clips(layer, x)
                x = torch.cat([cls, own, x[:, heads + present :]], dim=1)
                present = own.shape[1]
            x = block(self.visual.ln_pre(x) if layer == 0 else x)
        cls = self.visual.ln_post(x[:, :heads].reshape(batch, count, -1))
        return unit(unit(self.visual.proj(cls)).mean(dim=1))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [N, T] -> float32 unit rows [N, E]."""
        eot = ids.argmax(dim=1)
        x = F.embedding(ids, self.text.token_embedding.weight.to(self.dtype))
        count = 0
        if self.prompts is not None:
            count = self.prompts.text.shape[1]
            order, at = self._places(eot, ids.shape[1])
            order, at = (index[..., None].expand(-1, -1, x.shape[-1]) for index in (order, at))
        for layer, block in enumerate(self.text.blocks):
            if self.prompts is not None:  # those of the layer before give way
                own = self.prompts.text[layer].to(x.dtype).expand(len(x), -1, -1)
                if layer == 0:
                    x = torch.cat([x, own], dim=1).gather(1, order)
                else:
                    x = x.scatter(1, at, own)
            if layer == 0:
                x = x + self.text.positional_embedding[: x.shape[1]].to(x.dtype)
            x = block(x)
        x = x[torch.arange(len(x), device=x.device), eot + count]
        return unit(self.text.proj(self.text.ln_final(x)))

    def _places(self, eot: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[SOS, prefix, words, suffix, EOT, rest] out of [SOS, words, EOT, rest, prompts].

        Returns:
            (order [N, T + P], where each token comes from; at [N, P], where the prompts stand).
        """
        first = torch.arange(1, 1 + self.prefix, device=eot.device).expand(len(eot), -1)
        last = torch.arange(self.suffix, device=eot.device) + self.prefix + eot[:, None]
        at = torch.cat([first, last], dim=1)
        count = at.shape[1]
        # Prompts have their places; tokens take those that are left, in order.
        taken = torch.zeros(len(eot), slots + count, dtype=torch.bool, device=eot.device)
        taken.scatter_(1, at, True)
        order = (~taken).cumsum(1) - 1
        prompts = torch.arange(slots, slots + count, device=eot.device).expand(len(eot), -1)
        return order.scatter(1, at, prompts), at

    def loss(self, frames: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The symmetric cross-entropy of a batch of pairs."""
        text, video = self.encode_text(ids), self.encode_video(frames)
        logits = self.logit_scale.exp().clamp(max=100) * text @ video.T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    forward = loss


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x.float(), dim=-1)
