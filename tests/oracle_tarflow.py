"""TARFlow from its formulas (arXiv 2412.06329, section 3), in plain torch, on an ml-tarflow state_dict: an oracle.

Nothing is shared with biflow and nothing is fast: decoding runs the whole network again for every token. Tokens are
(B,T,D); the log-determinant is ml-tarflow's, the mean over T and D, and z is not divided by sqrt(var).
"""

import torch
import torch.nn.functional as F


def make_state_dict(
    tokens, channels, width, blocks, layers, classes=0, nvp=True, var=None, std=0.1, dtype=torch.float32, seed=0
):
    """A random state_dict in ml-tarflow's format: every weight drawn, so that no term is zero by construction."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, around=0.0):
        return around + std * torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    state = {"var": torch.ones(tokens, channels, dtype=dtype) if var is None else var}
    for i in range(blocks):
        shapes = {"proj_in": (width, channels), "proj_out": (channels * (2 if nvp else 1), width)}
        for j in range(layers):
            at, ml = f"attn_blocks.{j}.attention.", f"attn_blocks.{j}.mlp."
            shapes |= {at + "norm": (width,), at + "qkv": (3 * width, width), at + "proj": (width, width)}
            shapes |= {ml + "norm": (width,), ml + "main.0": (4 * width, width), ml + "main.2": (width, 4 * width)}
        for name, shape in shapes.items():
            state[f"blocks.{i}.{name}.weight"] = draw(*shape, around=1.0 if len(shape) == 1 else 0.0)
            state[f"blocks.{i}.{name}.bias"] = draw(shape[0])
        state[f"blocks.{i}.pos_embed"] = draw(tokens, width)
        if classes:
            state[f"blocks.{i}.class_embed"] = draw(classes, 1, width, around=0.0) * 3
        state[f"blocks.{i}.attn_mask"] = torch.ones(tokens, tokens, dtype=dtype).tril()
    return state


class Oracle:
    def __init__(self, state, head_dim):
        self.state = state
        self.head_dim = head_dim
        self.blocks = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        self.layers = 1 + max(int(k.split(".")[3]) for k in state if ".attn_blocks." in k)
        self.nvp = state["blocks.0.proj_out.bias"].numel() == 2 * state["var"].shape[1]

    def tokens(self, images, patch):
        return F.unfold(images, patch, stride=patch).transpose(1, 2)

    def _network(self, i, u, y, temperature):
        """Block i's transformer on block-ordered tokens u: the shift b and log-scale a of the token AFTER each row."""
        s = {k.removeprefix(f"blocks.{i}."): v for k, v in self.state.items() if k.startswith(f"blocks.{i}.")}
        length = u.shape[1]
        place = s["pos_embed"].flip(0) if i % 2 else s["pos_embed"]
        h = u @ s["proj_in.weight"].T + s["proj_in.bias"] + place
        if "class_embed" in s:
            table = s["class_embed"][:, 0]
            labels = [-1] * len(u) if y is None else y.tolist()
            h = h + torch.stack([table.mean(0) if k < 0 else table[k] for k in labels])[:, None]
        future = torch.ones(length, length).triu(1).bool()

        def affine(name, x):
            return x @ s[name + ".weight"].T + s[name + ".bias"]

        def layer_norm(name, x):
            centred = x - x.mean(-1, keepdim=True)
            return (
                centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * s[name + ".weight"]
                + s[name + ".bias"]
            )

        for j in range(self.layers):
            name = f"attn_blocks.{j}."
            mixed = affine(name + "attention.qkv", layer_norm(name + "attention.norm", h))
            heads = []
            width = h.shape[-1]
            for lo in range(0, width, self.head_dim):
                q, k, v = (mixed[..., part * width + lo : part * width + lo + self.head_dim] for part in range(3))
                logits = q @ k.mT / (self.head_dim**0.5 * temperature)
                heads.append(logits.masked_fill(future, -torch.inf).softmax(-1) @ v)
            h = h + affine(name + "attention.proj", torch.cat(heads, -1))
            inner = affine(name + "mlp.main.0", layer_norm(name + "mlp.norm", h))
            h = h + affine(name + "mlp.main.2", inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
        out = affine("proj_out", h)
        if not self.nvp:
            return torch.zeros_like(out), out
        half = out.shape[-1] // 2
        return out[..., :half], out[..., half:]

    def encode(self, x, y=None):
        """x (B,T,D) -> z (B,T,D), logdet (B,) = -mean a."""
        logdet = torch.zeros(len(x), dtype=x.dtype)
        for i in range(self.blocks):
            u = x.flip(1) if i % 2 else x
            a, b = self._network(i, u, y, 1.0)
            rest = (u[:, 1:] - b[:, :-1]) * torch.exp(-a[:, :-1])
            logdet = logdet - a[:, :-1].sum((1, 2)) / u[0].numel()
            u = torch.cat([u[:, :1], rest], 1)
            x = u.flip(1) if i % 2 else u
        return x, logdet

    def decode(self, z, y=None, guidance=0.0, guide="ab", anneal=False, attn_temp=1.0):
        """z (B,T,D), standard normal -> x (B,T,D)."""
        x = z * self.state["var"].sqrt()
        for i in reversed(range(self.blocks)):
            u = (x.flip(1) if i % 2 else x).clone()
            steps = u.shape[1] - 1
            for t in range(1, steps + 1):
                a, b = (p[:, t - 1] for p in self._network(i, u, y, 1.0))
                if guidance:
                    a0, b0 = (p[:, t - 1] for p in self._network(i, u, None, attn_temp))
                    g = guidance * t / steps if anneal else guidance
                    a = a + g * (a - a0) if "a" in guide else a
                    b = b + g * (b - b0) if "b" in guide else b
                u[:, t] = u[:, t] * torch.exp(a) + b
            x = u.flip(1) if i % 2 else u
        return x
