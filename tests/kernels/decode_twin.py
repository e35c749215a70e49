"""A Python twin of decode_block's schedule: what each phase of a step must write, from what the buffers hold before it.

The kernels' order of phases, buffers and layouts are those of csrc/cuda/decode_block_state.cuh. The twin computes in
fp64 from the kernel's own buffers, so that a difference names the phase that made it.
"""

from dataclasses import dataclass

import torch

from biflow.reference.affine import affine_decode
from biflow.reference.block_params import _guided, _mlp, _norm, _rotate

NAMES = ("x", "y", "o", "h", "partial", "lse", "qkv", "raw", "cache")


@dataclass(frozen=True)
class Place:
    step: int
    layer: int
    phase: str


def padded(n, to=32):
    return -(-n // to) * to


class Twin:
    """One decode of a block: its schedule, its buffers in a workspace, and the phases."""

    def __init__(self, config, weights, precision, z, given, plan, words, offsets):
        """given: the `Condition` of the call. plan, words, offsets: from `decode_block_buffers`."""
        self.c, self.precision, self.z, self.given = config, precision, z.double(), given
        self.weights = {name: w.double() for name, w in weights.items()}
        self.in_place, self.splits = bool(plan[5]), plan[3]
        self.words, self.offsets = words, dict(zip(NAMES, offsets, strict=True))
        self.rows = z.shape[0] * given.passes
        evaluated = config.tokens - (0 if config.start_token else 1)
        self.prefix = given.prefix_tokens if evaluated else 0
        self.steps = self.prefix + evaluated

    def places(self):
        """Every phase that runs, in order."""
        for step in range(self.steps):
            yield Place(step, 0, "embed")
            for layer in range(self.c.layers):
                names = ["norm1", "qkv", "attention", "proj", "norm2", "fc1", "fc2"]
                if self.in_place:
                    names = [n for n in names if not n.startswith("norm")]
                if step < self.prefix and layer == self.c.layers - 1:  # only its keys and values are needed
                    names = names[: names.index("attention") + 1]
                for name in names:
                    yield Place(step, layer, name)
            if step >= self.prefix:
                yield Place(step, 0, "head")
        yield Place(self.steps, 0, "embed")

    def buffers(self, workspace):
        """The buffers as fp64 tensors without their padding; lse and partial where there are several splits."""
        c, rows = self.c, self.rows
        d8, act = padded(c.head_dim, 8), torch.float32 if self.precision == "fp32" else torch.bfloat16
        raw = c.channels if c.shift_only else 2 * c.channels
        shapes = {  # name: shape with padding, dtype, sizes without
            "x": ((rows, padded(c.width)), torch.float32, (rows, c.width)),
            "y": ((rows, padded(c.width)), act, (rows, c.width)),
            "o": ((rows, padded(c.width)), act, (rows, c.width)),
            "h": ((rows, padded(c.mlp_hidden)), act, (rows, c.mlp_hidden)),
            "qkv": ((rows, padded(3 * c.width)), torch.float32, (rows, 3 * c.width)),
            "raw": ((rows, padded(raw)), torch.float32, (rows, raw)),
            "cache": (
                (c.layers, rows, c.width // c.head_dim, 2, self.prefix + c.tokens, d8),
                act,
                (c.layers, rows, c.width // c.head_dim, 2, self.prefix + c.tokens, c.head_dim),
            ),
            "partial": ((self.splits, rows, padded(c.width)), torch.float32, (self.splits, rows, c.width)),
            "lse": ((self.splits, rows, c.width // c.head_dim), torch.float32, None),
        }
        absent = {"partial", "lse"} if self.splits == 1 else {"o"}
        absent |= {"y"} if self.in_place else set()
        found = {}
        for name, (shape, dtype, sizes) in shapes.items():
            if name in absent:
                continue
            n = torch.Size(shape).numel()
            flat = workspace[self.offsets[name] :].view(dtype)[:n].view(shape)
            found[name] = flat[tuple(slice(s) for s in sizes or shape)].double()
        return found

    # --- what a phase makes of the buffers before it -------------------------------------------------------------

    def expected(self, at, before, out):
        """{name: value} of the buffers that the phase writes; "out" is the output so far, in data order, fp64."""
        return getattr(self, f"_{at.phase.rstrip('12')}")(at, before, out)

    def _rounded(self, t):
        return t if self.precision == "fp32" else t.float().bfloat16().double()

    def _linear(self, x, name):
        w = self.weights[f"{name}.weight"]
        w = self._rounded(w) if name.startswith("layers.") else w
        return x @ w.T + self.weights[f"{name}.bias"]

    def _index(self, n):
        return self.c.tokens - 1 - n if self.c.flip else n

    def _embed(self, at, before, out):
        c, e = self.c, at.step - self.prefix
        added, prefix, null_added, null_prefix = self.given.tensors
        pairs = ((added, null_added), (prefix, null_prefix))
        added, prefix = (
            None if own is None else torch.cat([own, null]).double() if self.given.passes == 2 else own.double()
            for own, null in pairs
        )
        if e < 0:
            return {"x": prefix[:, at.step]}
        made = e - (1 if c.start_token else 0)
        written = {}
        if made >= 0:
            batch, t = self.z.shape[0], self._index(made)
            raw = before["raw"] if e > 0 else torch.zeros_like(before["raw"])
            own = raw[:batch, None]
            if self.given.passes == 2 and e > 0:
                o, rows = self.given.options, [own.new_zeros(batch, c.tokens, own.shape[2]) for _ in range(2)]
                rows[0][:, t], rows[1][:, t] = raw[:batch], raw[batch:]
                own = _guided(*rows, c, o["guidance"], o["guide"], o["anneal"])[:, t : t + 1]
            options = dict(layout=c.layout, scale=c.scale, clip=c.clip, clip_on=c.clip_on, causal=False)
            if c.shift_only:
                own, options = torch.cat([torch.zeros_like(own), own], -1), dict(options, layout="scale_shift")
                options["scale"] = "exp"
            out = out.clone()
            out[:, t : t + 1] = affine_decode(self.z[:, t : t + 1], own, **options)
            written["out"] = out
        if at.step == self.steps:
            return written
        u = self.weights["start_token"].expand(self.z.shape[0], -1) if made < 0 else out[:, self._index(made)]
        h = self._linear(u, "proj_in").repeat(self.given.passes, 1)
        if c.pos_embed:
            h = h + self.weights["pos_embed"][self._index(e)]
        return {**written, "x": h if added is None else h + added}

    def _norm(self, at, before, out):
        name = f"layers.{at.layer}.{at.phase}"
        return {"y": self._rounded(_norm(before["x"], self.weights, name, self.c.norm))}

    def _normed(self, at, before, which):
        if not self.in_place:
            return before["y"]
        return self._norm(Place(at.step, at.layer, f"norm{which}"), before, None)["y"]

    def _qkv(self, at, before, out):
        return {"qkv": self._linear(self._normed(at, before, 1), f"layers.{at.layer}.qkv")}

    def _attention(self, at, before, out):
        c, name = self.c, f"layers.{at.layer}"
        q, k, v = before["qkv"].view(self.rows, 3, -1, c.head_dim).unbind(1)
        if c.qk_norm:
            q, k = (_norm(t, self.weights, f"{name}.{n}", "rmsnorm") for t, n in ((q, "q_norm"), (k, "k_norm")))
        if c.rope and at.step >= self.prefix:
            t = self._index(at.step - self.prefix)
            q, k = (_rotate(x, self.weights["rope_cos"][t], self.weights["rope_sin"][t]) for x in (q, k))
        cache = before["cache"].clone()
        cache[at.layer, :, :, 0, at.step], cache[at.layer, :, :, 1, at.step] = self._rounded(k), self._rounded(v)
        keys, values = cache[at.layer, :, :, :, : at.step + 1].unbind(2)
        logits = (keys * q[:, :, None]).sum(-1) / c.head_dim**0.5
        if self.given.passes == 2:
            logits[self.z.shape[0] :] /= self.given.options["attn_temp"]
        if self.splits == 1:
            o = (logits.softmax(-1)[..., None] * values).sum(-2)
            return {"cache": cache, "o": self._rounded(o.flatten(1))}
        share = -(-(at.step + 1) // self.splits)
        parts, weights = [], []
        for split in range(self.splits):
            some = slice(split * share, (split + 1) * share)
            parts.append((logits[..., some].softmax(-1)[..., None] * values[:, :, some]).sum(-2).flatten(1))
            weights.append(logits[..., some].logsumexp(-1) / torch.tensor(2.0).double().log())
        return {"cache": cache, "partial": torch.stack(parts), "lse": torch.stack(weights)}

    def _proj(self, at, before, out):
        if self.splits == 1:
            o = before["o"]
        else:
            weights = (before["lse"] - before["lse"].amax(0)).exp2()
            weights = (weights / weights.sum(0)).repeat_interleave(self.c.head_dim, -1)
            o = self._rounded((weights * before["partial"]).sum(0))
        return {"x": before["x"] + self._linear(o, f"layers.{at.layer}.proj")}

    def _fc(self, at, before, out):
        name = f"layers.{at.layer}"
        if at.phase == "fc2":
            return {"x": before["x"] + self._linear(before["h"], f"{name}.fc2")}
        identity = {
            f"{name}.fc2.weight": torch.eye(self.c.mlp_hidden).double(),
            f"{name}.fc2.bias": torch.zeros(1).double(),
        }
        first = {n: self._rounded(w) if n.endswith("fc1.weight") else w for n, w in self.weights.items()}
        return {"h": self._rounded(_mlp(self._normed(at, before, 2), first | identity, self.c, name))}

    def _head(self, at, before, out):
        return {"raw": self._linear(before["x"], "proj_out")}
