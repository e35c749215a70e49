"""One block of a TarFlow: a causal transformer that writes the affine parameters of each token."""

import contextlib
import math
import threading
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from biflow import ops
from biflow.models.iterate import BlockIterate, GraphIterate, Iterates
from biflow.models.layers import Layer, class_rows, layers_in, recording, rope_tables
from biflow.models.passes import graphable
from biflow.models.sequential import Sequential
from biflow.ops import BlockConfig
from biflow.ops._checks import check_device
from biflow.ops._weights import weights_key
from biflow.solvers import Condition


class Block(nn.Module):
    """One flow block: a causal transformer that writes the affine parameters of each token from the tokens before it.

    `params`, `guided_params`, `affine` and `forward` work in block order: `TarFlow` turns the tokens (B,T,D) around
    between blocks, the smallest tensor there is, so that attention is causal in memory order. What the solvers call
    (`biflow.solvers.InvertibleBlock`) takes and returns data order.

    Args:
        config: see `ops.BlockConfig`; the state_dict (with the rotary tables) is what `ops.pack_block` takes.
        context_dim: channels of the context tokens, projected to width before the sequence; 0: none.
    """

    def __init__(self, config: BlockConfig, context_dim: int = 0):
        super().__init__()
        self.config = config
        c, side = config, math.isqrt(config.tokens)
        self.proj_in = nn.Linear(c.channels, c.width)
        self.pos_embed = nn.Parameter(1e-2 * torch.randn(c.tokens, c.width)) if c.pos_embed else None
        self.class_embed = (
            nn.Parameter(1e-2 * torch.randn(c.num_classes, max(c.class_tokens, 1), c.width)) if c.num_classes else None
        )
        self.start_token = nn.Parameter(torch.randn(c.channels)) if c.start_token else None
        self.context_proj = nn.Linear(context_dim, c.width) if context_dim else None
        self.null_context = nn.Parameter(1e-2 * torch.randn(1, c.width)) if context_dim else None
        rope = rope_tables(side, c.head_dim) if c.rope else (None, None)
        self.register_buffer("rope_cos", rope[0], persistent=False)
        self.register_buffer("rope_sin", rope[1], persistent=False)
        self.layers = nn.ModuleList(
            Layer(c.width, c.head_dim, c.mlp_hidden, c.norm, c.gate, c.qk_norm) for _ in range(c.layers)
        )
        self.proj_out = nn.Linear(c.width, c.channels if c.shift_only else 2 * c.channels)
        nn.init.zeros_(self.proj_out.weight)  # the flow starts as the identity
        nn.init.zeros_(self.proj_out.bias)
        self._forget()

    @property
    def causal(self) -> bool:
        """Whether the affine op shifts the parameters by one token (no start token)."""
        return not self.config.start_token

    def project_context(self, context: Tensor | None, batch: int) -> Tensor | None:
        """Context (B,S,context_dim) -> prefix tokens (B,S,C); None -> the learned null token (B,1,C).

        None for a block without context.
        """
        if self.context_proj is None:
            return None
        return self.null_context.expand(batch, 1, -1) if context is None else self.context_proj(context)

    def params(
        self,
        x: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        *,
        classes: Tensor | None = None,
        attn_temp: float = 1.0,
        layer_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The parallel pass: x (B,N,D) in block order -> raw parameters (B,N,2D) as the network writes them.

        The first N <= T tokens. (B,N,D) if shift_only. context: prefix tokens at width C, from `project_context`. Row n
        holds the parameters of token n + 1 (shift) or n (start token). classes: class embeddings (B,K,C) in the place
        of those of y, K = max(class_tokens, 1). layer_dtype: what the layers' products are rounded to; None: nothing,
        but for autocast.
        """
        return self.features(x, y, context, (), classes=classes, attn_temp=attn_temp, layer_dtype=layer_dtype)[0]

    def features(
        self,
        x: Tensor,
        y: Tensor | None,
        context: Tensor | None,
        layers: Collection[int],
        *,
        classes: Tensor | None = None,
        attn_temp: float = 1.0,
        layer_dtype: torch.dtype | None = None,
        alone: bool = False,
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """`params`, and the residual stream (B,N,C) after each of `layers`, by its index; without the prefix.

        In block order. Row n belongs to the token that the network reads there: token n, or n - 1 with a start token.
        alone: no parameters but None, and no layers after the last of `layers`.
        """
        c, batch, tokens = self.config, x.shape[0], x.shape[1]
        if self.start_token is not None:
            x = torch.cat([self.start_token.expand(batch, 1, -1), x[:, :-1]], dim=1)
        h = self.proj_in(x).to(x.dtype)  # under autocast the residual stream stays in x's dtype
        if self.pos_embed is not None:
            h = h + (self.pos_embed.flip(0) if c.flip else self.pos_embed)[:tokens]
        prefix = []
        if self.class_embed is not None:
            rows = class_rows(self.class_embed, y, batch) if classes is None else classes
            if c.class_tokens:
                prefix.append(rows)
            else:
                h = h + rows
        if context is not None:
            prefix.append(context)
        length = sum(p.shape[1] for p in prefix)
        if prefix:
            h = torch.cat([*[p.to(h.dtype) for p in prefix], h], dim=1)
        rope = None
        if c.rope:
            rope = tuple((t.flip(0) if c.flip else t)[:tokens] for t in (self.rope_cos, self.rope_sin))
        delta, kept = None, {}
        with layers_in(layer_dtype, x.device):
            for index, layer in enumerate(self.layers):
                h, delta = layer(h, delta, rope, causal=True, prefix=length, attn_temp=attn_temp)
                if index in layers:
                    kept[index] = (h + delta)[:, length:]
                if alone and len(kept) == len(layers):
                    return None, kept
        return self.proj_out((h + delta)[:, length:]), kept

    def affine(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """z (B,N,D) in x's dtype and logdet (B,) of x under raw parameters, both the first N tokens in block order."""
        return ops.affine_encode(x, self._both_halves(raw), **self._affine_options())

    def affine_inverse(self, z: Tensor, raw: Tensor) -> Tensor:
        """x (B,N,D) in z's dtype from z and the raw parameters that the network writes for x, in block order."""
        return ops.affine_decode(z, self._both_halves(raw), **self._affine_options())

    def _both_halves(self, raw: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(raw), raw], dim=-1) if self.config.shift_only else raw  # exp(0) = 1

    def _affine_options(self) -> dict:
        c = self.config
        return {"layout": c.layout, "scale": c.scale, "clip": c.clip, "clip_on": c.clip_on, "causal": self.causal}

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        layer_dtype: torch.dtype | None = None,
        classes: Tensor | None = None,
        layers: Collection[int] = (),
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """encode: x (B,T,D) in block order -> z (B,T,D), logdet (B,), `features` of `layers`. context as given."""
        prefix = self.project_context(context, x.shape[0])
        raw, kept = self.features(x, y, prefix, layers, classes=classes, layer_dtype=layer_dtype)
        return *self.affine(x, raw), kept

    def guided_params(self, x: Tensor, condition: Condition, prefix: Tensor | None) -> Tensor:
        """`params` as a guided decode uses them: raw + w (raw - raw of the unconditional pass) with w by token.

        x (B,N,D), the first N tokens in block order. prefix: from `project_context` of the condition's context.
        """
        c, guidance, (batch, tokens) = self.config, condition.guidance, x.shape[:2]
        raw = self.params(x, condition.y, prefix)
        if guidance.scale == 0:
            return raw
        null = None if prefix is None else self.null_context.expand(batch, prefix.shape[1], -1)
        other = self.params(x, None, null, attn_temp=guidance.attn_temp)
        weight = torch.full((tokens, 1), guidance.scale, dtype=raw.dtype, device=raw.device)
        if guidance.anneal:  # row n makes token n + 1 where the parameters shift
            index = torch.arange(tokens, dtype=raw.dtype, device=raw.device)[:, None]
            weight = weight * (index + (1 if self.causal else 0)) / max(c.tokens - 1, 1)
        halves = raw.new_tensor([("a" in guidance.guide), ("b" in guidance.guide)])
        halves = halves[1:] if c.shift_only else halves
        return raw + weight * halves.repeat_interleave(c.channels) * (raw - other)

    def weights(self) -> dict[str, Tensor]:
        """What `ops.pack_block` takes."""
        named = [*self.named_parameters(), *self.named_buffers()]
        return {k: v.detach() for k, v in named if not k.startswith(("context_proj", "null_context"))}

    def packed(self, *precisions: str) -> tuple[ops.BlockWeights, ...]:
        """The weights as the ops read them, in each precision; packed again when their values changed, however.

        Inside `frozen` they are looked at once. torch.compile breaks its graph here: a graph could not tell.
        """
        if self.proj_in.weight.is_cuda:  # in a graph of the caller's: it packs them each time
            weights = self.weights()
            return tuple(ops.pack_block(weights, self.config, p) for p in precisions)
        _, packed, looked = self._packs
        if looked and all(p in packed for p in precisions):
            return tuple(packed[p] for p in precisions)
        check_device("decode: weights", self.proj_in.weight)
        with self._packing:  # what is stored belongs to the key beside it, and to the `frozen` it was looked at in
            # one walk over the modules: parameters() and buffers() would be two, on the path of every decode
            modules: list[nn.Module] = [self]
            tensors: list[Tensor] = []
            for module in modules:  # grows
                modules += [m for m in module._modules.values() if m is not None]
                tensors += [*module._parameters.values(), *module._buffers.values()]
            key = weights_key([t for t in tensors if t is not None])
            packed = dict(self._packs[1]) if key == self._packs[0] else {}
            missing = [p for p in precisions if p not in packed]
            if missing:
                weights = self.weights()
                packed |= {p: ops.pack_block(weights, self.config, p) for p in missing}
            self._packs = key, packed, self._frozen > 0
        return tuple(packed[p] for p in precisions)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the weights must not change: they are looked at once, not on every call."""
        self._freeze(1)  # what changed since the last call is seen
        try:
            yield
        finally:
            self._freeze(-1)

    def _freeze(self, step: int) -> None:
        with self._packing:
            if 0 in (self._frozen, self._frozen + step):
                self._packs = *self._packs[:2], False
                self._period += 1
            self._frozen += step

    @property
    def _open_period(self) -> int | None:
        """Which `frozen` this is inside of, counted; None: in none."""
        return self._period if self._frozen else None

    def _condition(self, condition: Condition, batch: int) -> dict:
        """The condition as the ops of a packed block take it."""
        prefix, guidance = self.project_context(condition.context, batch), condition.guidance
        return {
            "y": condition.y,
            "context": prefix,
            "null_context": None if prefix is None else self.null_context.expand(prefix.shape[1], -1),
            "guidance": guidance.scale,
            "guide": guidance.guide,
            "anneal": guidance.anneal,
            "attn_temp": guidance.attn_temp,
        }

    @property
    def tokens(self) -> int:
        """T."""
        return self.config.tokens

    @property
    def sequential_passes(self) -> int:
        """Network evaluations of `decode_sequential`: without a start token the first token stays as it is."""
        return self.config.tokens - (0 if self.config.start_token else 1)

    def decode_sequential(self, z: Tensor, condition: Condition) -> Tensor:
        """The exact inverse, token by token: z (B,T,D) in data order -> x (B,T,D) in data order."""
        given = self._condition(condition, z.shape[0])
        if graphable((z,)) and not recording():
            return self._sequential.decode(self, z, condition.precision, given, self._open_period)
        (weights,) = self.packed(condition.precision)
        return ops.decode_block(z, weights, self.config, **given)

    def encode_packed(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """`forward` with the packed weights of the condition's precision, guided: x (B,T,D) in data order -> z, logdet.

        In data order too, where `forward` works in block order. Not differentiable.
        """
        (weights,) = self.packed(condition.precision)
        raw = ops.block_params(x, weights, self.config, **self._condition(condition, x.shape[0]))
        return ops.affine_encode(x, self._both_halves(raw), **{**self._affine_options(), "causal": False})

    def residual(self, x: Tensor, z: Tensor, condition: Condition) -> Tensor:
        """max |G(x) - z| over tokens and channels, (B,): how far x is from the inverse of z. Both in data order."""
        if self.config.flip:
            x, z = x.flip(1), z.flip(1)
        raw = self.guided_params(x, condition, self.project_context(condition.context, x.shape[0]))
        return (self.affine(x, raw)[0] - z).abs().flatten(1).amax(1)

    def iterate(self, z: Tensor, condition: Condition) -> BlockIterate | GraphIterate:
        """The fixed-point iteration towards the inverse of z (B,T,D), in data order."""
        precisions, given = (condition.precision,), self._condition(condition, z.shape[0])
        if condition.precision == "fp32" and ops.has_fast_bf16(z.device):
            precisions += ("bf16",)
        if graphable((z,)) and not recording():
            return self._iterates.start(self, z, precisions, given, self._open_period)
        weights, *draft = self.packed(*precisions)
        return BlockIterate(weights, draft[0] if draft else None, z, given)

    def _apply(self, fn, recurse=True):  # .to(), .cuda(), .double(): do not keep the old weights alive
        with self._packing:
            self._packs = None, {}, False
        self._iterates.forget()
        self._sequential.forget()
        return super()._apply(fn, recurse)

    def _forget(self) -> None:
        # the key of the packed weights, these by precision, and whether they need no look: always replaced together
        self._packs: tuple[int | None, dict[str, ops.BlockWeights], bool] = (None, {}, False)
        self._iterates, self._sequential = Iterates(), Sequential()  # on a GPU
        self._frozen = 0  # how many times, by whichever thread
        self._period = 0  # counts when `frozen` was opened and closed
        self._packing = threading.RLock()

    def __getstate__(self):  # caches: not copied, not saved
        own = ("_packs", "_iterates", "_sequential", "_frozen", "_period", "_packing")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._forget()
