"""TarFlow: a stack of causal transformer blocks, each an affine autoregressive flow over image patches.

The maths is TARFlow's (Zhai et al. 2024, arXiv 2412.06329, section 3); the configuration also covers what its
successors use: a learned start token, clipped parameters and softplus scales (STARFlow, arXiv 2506.06276), rotary
positions, RMSNorm, SwiGLU, QK-norm and in-context class tokens (BiFlow, arXiv 2512.10953).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from biflow import ops, solvers
from biflow.models.layers import (
    Layer,
    check_floats,
    check_labels,
    check_transformer,
    class_rows,
    patchify,
    rope_tables,
    unpatchify,
)
from biflow.ops import BlockConfig


@dataclass(frozen=True)
class TarFlowConfig:
    """Shape and options of a TarFlow.

    img_size, in_channels, patch_size: images (in_channels, img_size, img_size); T = (img_size / patch_size)^2 tokens of
        D = in_channels patch_size^2 channels.
    width, head_dim, mlp_ratio: C, d, and the MLP's hidden width over C.
    num_blocks, layers_per_block: flow blocks, and layers in each: one number, or one per block in encode order (the
        deep-shallow design of STARFlow is (2, 2, 2, 2, 2, 24)).
    num_classes, class_tokens: classes (0: none); class_tokens = 0 adds the class embedding to every token, K > 0 puts K
        class tokens before the sequence.
    context_dim: channels of `context` tokens put before the sequence (0: the model takes no context).
    noise_std: standard deviation of the Gaussian noise the model is trained with; > 0 turns on denoising in `sample`.
    norm, gate, qk_norm, rope, pos_embed: the layer's variants (models/layers.py); pos_embed is the learned table.
    start_token: a learned first token replaces the shift by one, so that all T tokens transform.
    shift_only: z = x - shift (TARFlow's nvp=False), with a prior variance `var` (T, D).
    scale, clip, clip_on: as in `ops.affine_encode`.
    """

    img_size: int
    in_channels: int = 3
    patch_size: int = 2
    width: int = 256
    num_blocks: int = 4
    layers_per_block: int | tuple[int, ...] = 2
    head_dim: int = 64
    mlp_ratio: float = 4.0
    num_classes: int = 0
    class_tokens: int = 0
    context_dim: int = 0
    noise_std: float = 0.0
    norm: str = "layernorm"
    gate: str = "gelu"
    qk_norm: bool = False
    rope: bool = False
    pos_embed: bool = True
    start_token: bool = False
    shift_only: bool = False
    scale: str = "exp"
    clip: tuple[str, float] | None = None
    clip_on: str = "both"

    def __post_init__(self):
        for name in ("img_size", "in_channels", "patch_size", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size: expected a multiple of patch_size {self.patch_size}, got {self.img_size}")
        if isinstance(self.layers_per_block, list):  # YAML and JSON have no tuples
            object.__setattr__(self, "layers_per_block", tuple(self.layers_per_block))
        if isinstance(self.clip, list):
            object.__setattr__(self, "clip", tuple(self.clip))
        layers = self.layers_per_block
        if isinstance(layers, tuple) and len(layers) != self.num_blocks:
            raise ValueError(f"layers_per_block: expected {self.num_blocks} numbers (num_blocks), got {len(layers)}")
        if min(layers if isinstance(layers, tuple) else (layers,)) < 1:
            raise ValueError(f"layers_per_block: expected at least 1 each, got {layers}")
        check_transformer(self.width, self.head_dim, self.norm, self.gate)
        for name in ("num_classes", "class_tokens", "context_dim", "noise_std"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.class_tokens and not self.num_classes:
            raise ValueError("class_tokens: expected 0 when num_classes is 0, got " + str(self.class_tokens))
        if not (math.isfinite(self.mlp_ratio) and round(self.mlp_ratio * self.width) >= 1):
            raise ValueError(f"mlp_ratio: expected mlp_ratio * width of at least 1, got {self.mlp_ratio}")
        if self.shift_only and (self.scale != "exp" or self.clip_on != "both"):
            raise ValueError("shift_only: has no scale, so scale='exp' and clip_on='both' are expected")
        self.block(0)

    @property
    def tokens(self) -> int:
        """T, tokens an image."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def channels(self) -> int:
        """D, channels a token."""
        return self.in_channels * self.patch_size**2

    def block(self, index: int) -> BlockConfig:
        """The configuration of block `index` in encode order; odd blocks read the tokens in reverse."""
        layers = self.layers_per_block
        return BlockConfig(
            tokens=self.tokens,
            channels=self.channels,
            width=self.width,
            layers=layers[index] if isinstance(layers, tuple) else layers,
            head_dim=self.head_dim,
            mlp_hidden=round(self.mlp_ratio * self.width),
            norm=self.norm,
            gate=self.gate,
            qk_norm=self.qk_norm,
            rope=self.rope,
            pos_embed=self.pos_embed,
            start_token=self.start_token,
            shift_only=self.shift_only,
            num_classes=self.num_classes,
            class_tokens=self.class_tokens,
            scale=self.scale,
            clip=self.clip,
            clip_on=self.clip_on,
            flip=index % 2 == 1,
        )


class Block(nn.Module):
    """One flow block: a causal transformer that writes the affine parameters of each token from the tokens before it.

    Works in block order throughout: `TarFlow` turns the sequence around before an odd block (config.flip).
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
        self._packed: tuple[tuple, ops.BlockWeights] | None = None

    @property
    def causal(self) -> bool:
        """Whether the affine op shifts the parameters by one token (no start token)."""
        return not self.config.start_token

    def project_context(self, context: Tensor | None, batch: int) -> Tensor | None:
        """Context (B,S,context_dim) -> prefix tokens (B,S,C); None -> the learned null token (B,1,C)."""
        if self.context_proj is None:
            return None
        return self.null_context.expand(batch, 1, -1) if context is None else self.context_proj(context)

    def params(
        self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None, *, attn_temp: float = 1.0
    ) -> Tensor:
        """The parallel pass: x (B,T,D) in block order -> raw parameters (B,T,2D) as the network writes them.

        (B,T,D) if shift_only. context: prefix tokens at width C, from `project_context`. Row n holds the parameters of
        token n + 1 (shift) or n (start token).
        """
        c, batch = self.config, x.shape[0]
        if self.start_token is not None:
            x = torch.cat([self.start_token.expand(batch, 1, -1), x[:, :-1]], dim=1)
        h = self.proj_in(x)
        if self.pos_embed is not None:
            h = h + (self.pos_embed.flip(0) if c.flip else self.pos_embed)
        prefix = []
        if self.class_embed is not None:
            rows = class_rows(self.class_embed, y, batch)
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
            rope = (self.rope_cos.flip(0), self.rope_sin.flip(0)) if c.flip else (self.rope_cos, self.rope_sin)
        for layer in self.layers:
            h = layer(h, rope, causal=True, prefix=length, attn_temp=attn_temp)
        return self.proj_out(h[:, length:])

    def affine(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """z (B,T,D) and logdet (B,) of x under raw parameters, both in block order."""
        c = self.config
        if c.shift_only:
            if c.clip is not None:
                raw = raw.clamp(-c.clip[1], c.clip[1]) if c.clip[0] == "hard" else c.clip[1] * (raw / c.clip[1]).tanh()
            shift = torch.cat([torch.zeros_like(raw[:, :1]), raw[:, :-1]], dim=1) if self.causal else raw
            logdet_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            return x - shift.to(x.dtype), torch.zeros(x.shape[0], dtype=logdet_dtype, device=x.device)
        return ops.affine_encode(
            x, raw, layout=c.layout, scale=c.scale, clip=c.clip, clip_on=c.clip_on, causal=self.causal
        )

    def forward(self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """encode: x (B,T,D) in block order -> z (B,T,D), logdet (B,). context as the user gave it."""
        return self.affine(x, self.params(x, y, self.project_context(context, x.shape[0])))

    def guided_encode(
        self, x: Tensor, y: Tensor | None, context: Tensor | None, guidance: solvers.Guidance
    ) -> tuple[Tensor, Tensor]:
        """`forward` with the parameters that a guided decode uses; x in block order."""
        c, batch = self.config, x.shape[0]
        prefix = self.project_context(context, batch)
        raw = self.params(x, y, prefix)
        if guidance.scale > 0:
            null = None if prefix is None else self.null_context.expand(batch, prefix.shape[1], -1)
            other = self.params(x, None, null, attn_temp=guidance.attn_temp)
            index = torch.arange(c.tokens, device=x.device) + (1 if self.causal else 0)  # token that row n makes
            weight = guidance.scale * (index / max(c.tokens - 1, 1) if guidance.anneal else torch.ones_like(index))
            halves = torch.tensor([float("a" in guidance.guide), float("b" in guidance.guide)], device=x.device)
            halves = halves[1:] if c.shift_only else halves
            weight = weight[:, None] * halves.repeat_interleave(c.channels)
            raw = raw + weight.to(raw.dtype) * (raw - other)
        return self.affine(x, raw)

    def packed(self) -> ops.BlockWeights:
        """The weights as `ops.decode_block` reads them, packed again only after they changed."""
        weights = {
            k: v.detach() for k, v in self.named_parameters() if not k.startswith(("context_proj", "null_context"))
        }
        weights |= {k: v for k, v in self.named_buffers() if v is not None}
        key = ops.weights_key(list(weights.values()))
        if self._packed is None or self._packed[0] != key:
            self._packed = (key, ops.pack_block(weights, self.config))
        return self._packed[1]

    def decode_sequential(
        self, z: Tensor, y: Tensor | None, context: Tensor | None, guidance: solvers.Guidance
    ) -> Tensor:
        """The exact inverse, token by token: z (B,T,D) in data order -> x (B,T,D) in data order."""
        prefix = self.project_context(context, z.shape[0])
        return ops.decode_block(
            z,
            self.packed(),
            self.config,
            y=y,
            context=prefix,
            null_context=None if prefix is None else self.null_context.expand(prefix.shape[1], -1),
            guidance=guidance.scale,
            guide=guidance.guide,
            anneal=guidance.anneal,
            attn_temp=guidance.attn_temp,
        )

    def residual(
        self, x: Tensor, z: Tensor, y: Tensor | None, context: Tensor | None, guidance: solvers.Guidance
    ) -> Tensor:
        """max |G(x) - z| over tokens and channels, (B,): how far x is from the inverse of z. Both in data order."""
        if self.config.flip:
            x, z = x.flip(1), z.flip(1)
        return (self.guided_encode(x, y, context, guidance)[0] - z).abs().flatten(1).amax(1)

    def __getstate__(self):  # packed weights are a cache: not copied, not saved
        return {**self.__dict__, "_packed": None}


class TarFlow(nn.Module):
    """The forward model. encode: data to noise in one parallel pass; decode: its exact inverse, token by token.

    log p(x) = log N(z; 0, I) + log|det dz/dx| (arXiv 2412.06329, eq. 5), with z and logdet from `encode`.
    """

    def __init__(self, config: TarFlowConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config.block(i), config.context_dim) for i in range(config.num_blocks))
        # prior variance; ones unless shift_only, where `update_prior` moves it
        self.register_buffer("var", torch.ones(config.tokens, config.channels))

    def encode(
        self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None, *, return_states: bool = False
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, list[Tensor]]:
        """Data to noise.

        Args:
            x: images (B,C,H,W), float, in [-1, 1].
            y: class labels (B,) int64; -1 or None: unconditional (the mean class embedding).
            context: (B,S,context_dim) float, or None (the learned null context).
            return_states: also return the trajectory.

        Returns:
            z (B,T,D) in x's dtype; logdet (B,) = log|det dz/dx| in nats, fp32 (fp64 for fp64 x); with return_states the
            list x_0, ..., x_B, each (B,T,D) in data order, x_0 the patches of x and x_B = z.

        Raises:
            TypeError, ValueError: wrong dtype or shape, labels out of range, NaN or infinite values.
        """
        c = self.config
        check_floats("x", x, (None, c.in_channels, c.img_size, c.img_size))
        self._check_condition(y, context, x.shape[0])
        h = patchify(x, c.patch_size)
        states, flipped, logdet = [h], False, 0.0
        for block in self.blocks:
            if block.config.flip != flipped:
                h, flipped = h.flip(1), block.config.flip
            h, block_logdet = block(h, y, context)
            logdet = logdet + block_logdet
            if return_states:
                states.append(h.flip(1) if flipped else h)
        z = h.flip(1) if flipped else h
        if c.shift_only:
            z = z * self.var.rsqrt().to(z.dtype)
            logdet = logdet - 0.5 * self.var.log().sum()
            states[-1] = z
        return (z, logdet, states) if return_states else (z, logdet)

    def log_prob(self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """log p(x | y), (B,), nats: -|z|^2 / 2 - (T D / 2) log 2 pi + logdet. Arguments and errors as `encode`."""
        z, logdet = self.encode(x, y, context)
        wide = z.to(logdet.dtype).flatten(1)
        return logdet - 0.5 * (wide.square().sum(1) + wide.shape[1] * math.log(2 * math.pi))

    def bits_per_dim(
        self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None, *, bin_width: float = 2 / 256
    ) -> Tensor:
        """-log_prob / (T D ln 2) - log2(bin_width), (B,): bits a channel of data quantised to steps of `bin_width`.

        x must be dequantised: uniform noise over one bin added. 8-bit images in [-1, 1] have bins of 2/256.
        """
        if not bin_width > 0:
            raise ValueError(f"bin_width: expected a positive number, got {bin_width}")
        dims = self.config.tokens * self.config.channels
        return -self.log_prob(x, y, context) / (dims * math.log(2)) - math.log2(bin_width)

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        *,
        solver: str = "auto",
        window: int | None = None,
        guidance: float = 0.0,
        guide: str = "ab",
        anneal: bool = True,
        attn_temp: float = 1.0,
        precision: str = "fp32",
        tol: float = 1e-5,
        return_info: bool = False,
    ) -> Tensor | tuple[Tensor, solvers.DecodeInfo]:
        """Noise to data: the exact inverse of `encode`. Not differentiable: train through `encode`.

        Args:
            z: (B,T,D) fp32.
            y, context: the condition, as in `encode`.
            solver: "sequential", or "auto" (= "sequential").
            window: tokens a window of a windowed solver; None for the sequential one.
            guidance: g >= 0; 0 means none. At each token the raw parameters become r + w (r - r_u) with r_u of an
                unconditional pass (arXiv 2412.06329, section 3.5).
            guide: which parameters are guided: "a" (scale), "b" (shift) or "ab".
            anneal: w = g t / max(T - 1, 1) for the token of index t in block order; False: w = g.
            attn_temp: divides the attention logits of the unconditional pass; what guidance uses without classes.
            precision: "fp32".
            tol: tolerance of iterative solvers; the sequential one is exact and ignores it.
            return_info: also return a `solvers.DecodeInfo` with the residual of each sample; costs one encode.

        Returns:
            x (B,C,H,W) fp32, not clamped; with return_info (x, info).

        Raises:
            TypeError, ValueError: wrong dtype or shape, NaN in z, an unknown solver or precision, negative guidance.
        """
        c = self.config
        check_floats("z", z, (None, c.tokens, c.channels))
        if z.dtype != torch.float32:
            raise TypeError(f"z: decoding runs in fp32; expected a float32 tensor, got {z.dtype}")
        self._check_condition(y, context, z.shape[0])
        options = solvers.check_options(solver, window, precision, tol)
        strength = solvers.Guidance(guidance, guide, anneal, attn_temp)
        x = z * self.var.sqrt() if c.shift_only else z
        x, info = solvers.decode(self.blocks, x, y, context, strength, options, certify=return_info)
        x = unpatchify(x, c.patch_size)
        return (x, info) if return_info else x

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        denoise: bool | None = None,
        generator: torch.Generator | None = None,
        **decode_options,
    ) -> Tensor:
        """Draw n images: z ~ N(0, temperature^2), decode, and remove the training noise by one score step.

        Args:
            n: number of images.
            y, context: the condition, as in `encode`.
            temperature: standard deviation of z.
            denoise: x + noise_std^2 grad log p(x | y) (arXiv 2412.06329, section 3.4). None: iff noise_std > 0.
            generator: source of randomness.
            decode_options: passed to `decode`.

        Returns:
            (n,C,H,W) fp32, about [-1, 1], not clamped. Works under torch.no_grad() and torch.inference_mode().
        """
        c = self.config
        if n < 0:
            raise ValueError(f"n: expected 0 or more, got {n}")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
        if decode_options.get("return_info"):
            raise ValueError("return_info: expected with decode, not with sample")
        denoise = c.noise_std > 0 if denoise is None else denoise
        if denoise and c.noise_std == 0:
            raise ValueError("denoise: expected a model with noise_std > 0, got noise_std = 0")
        device = generator.device if generator is not None else self.var.device
        z = torch.randn(n, c.tokens, c.channels, generator=generator, device=device).to(self.var.device)
        x = self.decode(temperature * z, y, context, **decode_options)
        return self.denoise(x, y, context) if denoise else x

    def denoise(self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """x + noise_std^2 grad_x log p(x | y), (B,C,H,W): the clean data's posterior mean under the model (Tweedie)."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            y = None if y is None else y.clone()
            context = None if context is None else context.detach().clone()
            (score,) = torch.autograd.grad(self.log_prob(leaf, y, context).sum(), leaf)
            return (leaf + self.config.noise_std**2 * score).detach()

    @torch.no_grad()
    def update_prior(self, z: Tensor, rate: float = 0.1) -> None:
        """Move `var` towards the second moment of the un-normalised z (B,T,D); for shift_only models while training."""
        if not self.config.shift_only:
            raise ValueError("update_prior: expected a shift_only model, whose prior variance is learned")
        self.var.lerp_(z.float().square().mean(0) * self.var, rate)

    def _check_condition(self, y: Tensor | None, context: Tensor | None, batch: int) -> None:
        check_labels(y, self.config.num_classes, batch)
        if context is not None:
            if not self.config.context_dim:
                raise ValueError("context: expected None for a model with context_dim=0, got a tensor")
            check_floats("context", context, (batch, None, self.config.context_dim))
