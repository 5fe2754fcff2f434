"""All methods once more, in NumPy and float64, one clip and one caption at a time.

Written from the description of the method with plain loops; it shares the names of parameters
with the package under test, and no code.
"""

import numpy as np

PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Reference:
    """The features of one method.

    Args:
        params: flat {name: array}.
        method: the values of the config's section `method`, as attributes.
        depth: {"visual", "text"}: layers of each tower.
        patch: side of a patch in pixels.
    """

    def __init__(self, params, method, depth, patch):
        self.p = {key: np.asarray(value, np.float64) for key, value in params.items()}
        self.m, self.name, self.depth, self.patch = method, method.name, depth, patch
        joins = "vop_f" in method.name and method.branches != "text"
        self.split = method.split_layer if joins else depth["visual"]
        self.generates = method.name.endswith("c") and method.branches != "text"
        last = method.last_layer or max(depth.values())
        self.prompted = [layer for layer in range(method.first_layer - 1, last)]

    def prompts(self, name, layer, default, start=0):
        """The rows of a layer in the table `prompts/name`, whose first is of layer `start`."""
        if layer not in self.prompted or f"prompts/{name}" not in self.p:
            return default
        return self.p[f"prompts/{name}"][layer - max(start, self.prompted[0])]

    def dense(self, name, x):
        kernel = self.p[f"{name}/kernel"]
        out = x @ kernel.reshape(x.shape[-1], -1)
        return out + self.p[f"{name}/bias"].reshape(-1) if f"{name}/bias" in self.p else out

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.p[f"{name}/scale"] + self.p[f"{name}/bias"]

    def attention(self, name, x, causal):
        heads, width = self.p[f"{name}/query/bias"].shape
        out = []
        q, k, v = (self.dense(f"{name}/{part}", x) for part in ("query", "key", "value"))
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            scores = q[:, columns] @ k[:, columns].T / np.sqrt(width)
            if causal:
                scores[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(weights / weights.sum(-1, keepdims=True) @ v[:, columns])
        mixed = np.concatenate(out, axis=-1)
        kernel = self.p[f"{name}/out/kernel"]
        return mixed @ kernel.reshape(-1, kernel.shape[-1]) + self.p[f"{name}/out/bias"]

    def adapter(self, tower, layer, x):
        name = f"adapters/{tower}_{layer}"
        return self.dense(f"{name}/up", np.maximum(self.dense(f"{name}/down", x), 0))

    def block(self, name, x, causal=False, tower=None, layer=None):
        h = self.norm(f"{name}/ln_1", x)
        added = self.attention(f"{name}/attn", h, causal)
        if self.name == "adapter_attn" and tower:
            added = added + self.adapter(tower, layer, h)
        x = x + added
        h = self.norm(f"{name}/ln_2", x)
        inside = self.dense(f"{name}/mlp/c_fc", h)
        added = self.dense(f"{name}/mlp/c_proj", inside * sigmoid(1.702 * inside))
        if self.name == "adapter_ffn" and tower:
            added = added + self.adapter(tower, layer, h)
        return x + added

    def lstm(self, cls, direction):
        """[F, D] -> [F, D], frames in the order given."""
        w, u = (self.p[f"prompts/context/lstm/{k}_kernel"][direction] for k in ("input", "hidden"))
        b = self.p["prompts/context/lstm/bias"][direction]
        h = c = np.zeros(cls.shape[1])
        out = []
        for x in cls:
            i, f, g, o = np.split(x @ w + h @ u + b, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        return np.array(out)

    def context(self, cls):
        """[F, D] -> [F, P, D]."""
        if self.m.cmm == "transformer":
            x = cls + self.p["prompts/context/transformer/frame_position"]
            for layer in range(4):
                x = self.block(f"prompts/context/transformer/blocks_{layer}", x)
        else:
            x = self.lstm(cls, 0)
            if self.m.cmm == "bilstm":
                x = np.concatenate([x, self.lstm(cls[::-1], 1)[::-1]], axis=1)
        return self.dense("prompts/context/stretch", x).reshape(len(cls), -1, cls.shape[1])

    def frames(self, frames):
        """uint8 [F, S, S, 3] -> unit rows [F, E]."""
        kernel = self.p["clip/visual/conv1/kernel"]  # [patch, patch, 3, D]
        rows = []
        for frame in (frames / 255 - PIXEL_MEAN) / PIXEL_STD:
            side = frame.shape[0] // self.patch
            patches = [
                np.einsum("hwc,hwcd->d", frame[y : y + self.patch, x : x + self.patch], kernel)
                for y in range(0, side * self.patch, self.patch)
                for x in range(0, side * self.patch, self.patch)
            ]
            rows.append(
                np.array([self.p["clip/visual/class_embedding"], *patches])
                + self.p["clip/visual/positional_embedding"]
            )
        cls = np.array([row[0] for row in rows])  # [F, D]
        patches = np.array([row[1:] for row in rows])  # [F, G, D]
        for layer in range(self.depth["visual"]):
            if layer == self.split:
                position = self.p["prompts/frame_position"]
                cls, patches = cls + position, patches + position[:, None]
            if layer < self.split:
                cls, patches = self.within_frames(layer, cls, patches)
            else:
                cls, patches = self.across_frames(layer, cls, patches)
        features = self.norm("clip/visual/ln_post", cls) @ self.p["clip/visual/proj/kernel"]
        return unit(features)

    def visual_block(self, layer, x):
        if layer == 0:
            x = self.norm("clip/visual/ln_pre", x)
        name = f"clip/visual/transformer/resblocks.{layer}"
        return self.block(name, x, tower="visual", layer=layer)

    def within_frames(self, layer, cls, patches):
        nothing = np.zeros((0, cls.shape[1]))
        generic = self.prompts("visual", layer, nothing)
        own = self.prompts("position", layer, [nothing] * len(cls))
        if self.generates and layer in self.prompted:
            if self.m.cmm_role == "prompts":
                own = self.context(cls)
            else:
                cls = cls + self.context(cls)[:, 0]
        out_cls, out_patches = [], []
        for j in range(len(cls)):
            x = np.concatenate([cls[j][None], generic, own[j], patches[j]])
            x = self.visual_block(layer, x)
            out_cls.append(x[0])
            out_patches.append(x[1 + len(generic) + len(own[j]) :])
        return np.array(out_cls), np.array(out_patches)

    def across_frames(self, layer, cls, patches):
        prompts = self.prompts("video", layer, cls[:0], self.split)
        x = self.visual_block(layer, np.concatenate([cls, prompts, *patches]))
        return x[: len(cls)], x[len(cls) + len(prompts) :].reshape(patches.shape)

    def text(self, ids):
        """int [T] -> unit [E], read at EOT or, by the released code, at EOT's slot plus P."""
        x = self.p["clip/text/token_embedding/embedding"][ids]
        eot = int(np.argmax(ids))
        end = eot if self.m.suffix == "eot" else len(ids) - 1
        start, words, rest = x[:1], x[1:end], x[end:]
        for layer in range(self.depth["text"]):
            prompts = self.prompts("text", layer, x[:0])
            before, after = prompts[: self.m.text_prefix], prompts[self.m.text_prefix :]
            x = np.concatenate([start, before, words, after, rest])
            if layer == 0:
                x = x + self.p["clip/text/positional_embedding"][: len(x)]
            name = f"clip/text/transformer/resblocks.{layer}"
            x = self.block(name, x, causal=True, tower="text", layer=layer)
            feature = x[eot + len(prompts)]
            start, x = x[:1], x[1 + len(before) :]
            words, rest = x[: len(words)], x[len(words) + len(after) :]
        feature = self.norm("clip/text/ln_final", feature)
        return unit(feature @ self.p["clip/text/text_projection/kernel"])
