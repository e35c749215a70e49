"""BiFlow's learned inverse: a bidirectional transformer that maps noise to clean data in one pass.

Source: BiFlow (arXiv 2512.10953). The layers form one group per flow block of the forward model, in decode order, plus
one group for denoising. After group k = 1, ..., B a head reads the hidden state and predicts the forward trajectory's
state x_{B-k}; after the last group, the clean image. The heads before the last serve training: sampling skips them.
Two options take ingredients away: without learned denoising there is no last group, and the output is x_0, the noisy
data; with re-embedded states each group starts from its predecessor's prediction and from nothing else.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from biflow import ops
from biflow.config import check_fields, check_number
from biflow.models.layers import (
    Layer,
    Norm,
    check_count,
    check_decoding,
    check_floats,
    check_generator,
    check_grid,
    check_labels,
    check_size,
    check_transformer,
    class_rows,
    input_dtype,
    layers_in,
    mlp_width,
    rope_tables,
    unpatchify,
)
from biflow.models.passes import PRECISIONS, PassModule


@dataclass(frozen=True)
class BiFlowConfig:
    """Shape and options of a BiFlow.

    img_size, in_channels, patch_size: as in the forward model's TarFlowConfig.
    num_blocks: B, flow blocks of the forward model; the reverse has B + 1 groups of layers, or B without
        learned_denoising.
    layers_per_group, width, head_dim, mlp_ratio: layers in each group; C; d (any even number: the flow's limit of 256
        is that of exact decoding); hidden width of the MLP over C (rounded
        to a multiple of 8).
    num_classes, class_tokens: classes (0: none) and in-context tokens per class.
    max_guidance, guidance_tokens: guidance strengths in [0, max_guidance] are an input of the network, given as
        in-context tokens, and sampling with guidance is one pass. max_guidance = 0: guidance is not an input; sampling
        with guidance takes two passes.
    norm, gate, qk_norm, rope, pos_embed: the layer's variants (models/layers.py).
    learned_denoising: a group of layers of its own turns x_0 into the clean image. False: the output is x_0, data with
        the noise that the flow was trained with, which `TarFlow.denoise` or nothing may remove.
    reembed_states: what a group hands to the next is its head's prediction of x_i, embedded anew by the input
        projection, with fresh class and guidance tokens; so the whole path runs through data space (B,T,D), as hidden
        distillation asks for. False: the hidden state goes on. The weights are the same ones either way.
    """

    img_size: int
    in_channels: int = 3
    patch_size: int = 2
    num_blocks: int = 4
    layers_per_group: int = 2
    width: int = 256
    head_dim: int = 64
    mlp_ratio: float = 8 / 3
    num_classes: int = 0
    class_tokens: int = 8
    max_guidance: float = 0.0
    guidance_tokens: int = 4
    norm: str = "rmsnorm"
    gate: str = "swiglu"
    qk_norm: bool = True
    rope: bool = True
    pos_embed: bool = True
    learned_denoising: bool = True
    reembed_states: bool = False

    def __post_init__(self):
        check_fields(self)
        check_grid(self.img_size, self.in_channels, self.patch_size)
        for name, least in (("num_blocks", 1), ("layers_per_group", 1), ("num_classes", 0), ("class_tokens", 0)):
            check_size(name, getattr(self, name), least)
        check_size("guidance_tokens", self.guidance_tokens, 0)
        check_transformer(self.width, self.head_dim, self.mlp_ratio, self.norm, self.gate)
        if self.num_classes and self.class_tokens < 1:
            raise ValueError(f"class_tokens: expected at least 1 for a model with classes, got {self.class_tokens}")
        check_number("max_guidance", self.max_guidance, minimum=0)
        if self.max_guidance and not self.num_classes:
            raise ValueError("max_guidance: expected 0 without classes (guidance needs a condition)")
        if self.max_guidance and self.guidance_tokens < 1:
            raise ValueError(f"guidance_tokens: expected at least 1 with max_guidance, got {self.guidance_tokens}")

    @property
    def tokens(self) -> int:
        """T, tokens an image."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def channels(self) -> int:
        """D, channels a token."""
        return self.in_channels * self.patch_size**2

    @property
    def num_groups(self) -> int:
        """Groups of layers: one a flow block, and one for denoising."""
        return self.num_blocks + int(self.learned_denoising)


class GuidanceEmbedding(nn.Module):
    """Guidance strength w (B,) -> in-context tokens (B, K, C): sinusoids of log(1 + w), then a two-layer MLP."""

    FREQUENCIES = 32

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.tokens = tokens
        self.fc1 = nn.Linear(2 * self.FREQUENCIES, width)
        self.fc2 = nn.Linear(width, tokens * width)
        frequency = math.pi * 2.0 ** torch.linspace(-3, 3, self.FREQUENCIES)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        angle = torch.log1p(w)[:, None] * self.frequency
        h = self.fc2(nn.functional.silu(self.fc1(torch.cat([angle.cos(), angle.sin()], dim=1))))
        return h.unflatten(1, (self.tokens, -1))


class Head(nn.Sequential):
    """A norm and a linear layer, zero at first: what a hidden state (B,T,C) says of the trajectory, (B,T,D)."""

    def __init__(self, norm: str, width: int, channels: int):
        super().__init__(Norm(norm, width), nn.Linear(width, channels))
        nn.init.zeros_(self[1].weight)
        nn.init.zeros_(self[1].bias)

    def error(self, h: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        """E (B,): the sum of scale (head(h) - target)^2 over each sample, without head(h) or norm(h) being kept.

        h (B,T,C), target (B,T,D), scale (B,T), the latter two without gradient: `ops.alignment_error`.
        """
        norm, linear = self
        return ops.alignment_error(
            h, target, norm.weight, norm.bias, linear.weight, linear.bias,
            scale=scale, kind=norm.kind, eps=norm.eps, dtype=input_dtype(linear),
        )  # fmt: skip


class BiFlow(PassModule):
    """The learned inverse G: z (and a class, and a guidance strength) -> clean image, in one parallel pass.

    Without learned_denoising the image is not clean: it is the flow's x_0, with the noise of its training.
    """

    def __init__(self, config: BiFlowConfig):
        super().__init__()
        self.config = c = config
        self.proj_in = nn.Linear(c.channels, c.width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(c.tokens, c.width)) if c.pos_embed else None
        self.class_embed = (
            nn.Parameter(0.02 * torch.randn(c.num_classes, c.class_tokens, c.width)) if c.num_classes else None
        )
        # in-context tokens of "no class": a learned row of its own, trained by dropping labels
        self.null_class = nn.Parameter(0.02 * torch.randn(1, c.class_tokens, c.width)) if c.num_classes else None
        self.guidance_embed = GuidanceEmbedding(c.guidance_tokens, c.width) if c.max_guidance else None
        rope = rope_tables(c.img_size // c.patch_size, c.head_dim) if c.rope else (None, None)
        self.register_buffer("rope_cos", rope[0], persistent=False)
        self.register_buffer("rope_sin", rope[1], persistent=False)
        hidden = mlp_width(c.mlp_ratio, c.width)
        self.groups = nn.ModuleList(
            nn.ModuleList(
                Layer(c.width, c.head_dim, hidden, c.norm, c.gate, c.qk_norm) for _ in range(c.layers_per_group)
            )
            for _ in range(c.num_groups)
        )
        # heads[k] reads the state after group k: k < B predicts x_{B-1-k}, k = B the clean image
        self.heads = nn.ModuleList(Head(c.norm, c.width, c.channels) for _ in range(c.num_groups))

    def forward(
        self,
        z: Tensor,
        y: Tensor | None = None,
        w: Tensor | None = None,
        *,
        return_states: bool = False,
        return_hidden: bool = False,
        layer_dtype: torch.dtype | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]] | tuple[Tensor, list[Tensor], list[Tensor]]:
        """One pass in token space; what training differentiates. Values are not checked here: see `decode`.

        Args:
            z: (B,T,D) noise.
            y: labels (B,) int64; -1 or None: no class.
            w: guidance strength (B,), float >= 0 (0 where y is -1), for a model with max_guidance > 0; None: 0.
            return_states: also return the heads' predictions of the trajectory.
            return_hidden: also return the hidden states that all heads but the output's read.
            layer_dtype: what the layers' products are rounded to; None: nothing, but for autocast.

        Returns:
            the output's tokens (B,T,D): clean, or x_0 without learned_denoising; with return_states after it
            [x_0, ..., x_{B-1}] predictions, each (B,T,D), data order; with return_hidden after these the hidden states
            (B,T,C) of x_0 (x_1 without learned_denoising), ..., x_{B-1}, as reversed(heads[:-1]) read them.
        """
        c, batch = self.config, z.shape[0]
        prefix = []
        if self.class_embed is not None:
            prefix.append(self._class_tokens(y, batch))
        if self.guidance_embed is not None:
            prefix.append(self.guidance_embed(z.new_zeros(batch) if w is None else w))
        length = sum(p.shape[1] for p in prefix)
        rope = (self.rope_cos, self.rope_sin) if c.rope else None
        h, delta, states, hidden = self._embed(z, prefix), None, [], []
        for group, head in zip(self.groups, self.heads, strict=True):
            with layers_in(layer_dtype, z.device):
                for layer in group:
                    h, delta = layer(h, delta, rope, causal=False, prefix=length)
            last = head is self.heads[-1]
            if return_states or return_hidden or c.reembed_states or last:
                h, delta = h + delta, None
                read = h[:, length:]
                if return_hidden and not last:
                    hidden.append(read)
                if return_states or c.reembed_states or last:
                    states.append(head(read))
            if c.reembed_states and not last:
                h = self._embed(states[-1].to(z.dtype), prefix)
        results = (states[-1],)
        if return_states:
            results += ((states[:-1] if c.learned_denoising else states)[::-1],)
        if return_hidden:
            results += (hidden[::-1],)
        return results if len(results) > 1 else results[0]

    def _embed(self, x: Tensor, prefix: list[Tensor]) -> Tensor:
        """Tokens (B,T,D) -> the residual stream (B,N+T,C) behind the condition's N tokens."""
        h = self.proj_in(x).to(x.dtype)  # under autocast the residual stream stays in x's dtype
        if self.pos_embed is not None:
            h = h + self.pos_embed
        return torch.cat([*[p.to(h.dtype) for p in prefix], h], dim=1) if prefix else h

    @torch.no_grad()
    def decode(self, z: Tensor, y: Tensor | None = None, *, guidance: float = 0.0, precision: str = "fp32") -> Tensor:
        """Noise to clean images, in one pass; in two (conditional and not) with guidance > 0 that was not trained in.

        Without learned_denoising the images have the noise of the flow's training, which `TarFlow.denoise` removes.

        Args:
            z: (B,T,D) fp32, as `TarFlow.encode` returns it.
            y: labels (B,) int64; -1 or None: no class; guidance does not act on those.
            guidance: w in [0, max_guidance] if trained in, any w >= 0 otherwise; 0 means none. Trained in:
                G(z | y, w). Otherwise G(z | y) + w (G(z | y) - G(z)).
            precision: "fp32", or "bf16": what the layers multiply is rounded to bf16 (models/passes.py).

        On a GPU the pass is recorded as a CUDA graph at the first call of each shape, and replayed after that; weights
        may change between calls in every way that torch knows of (`Passes`). Inside a CUDA graph of the caller's it is
        a part of that: call it once before, outside, because kernels compile and load at their first call.

        Returns:
            x (B,C,H,W) fp32, about [-1, 1], not clamped.

        Raises:
            TypeError, ValueError: wrong dtype or shape, NaN in z, labels or guidance out of range, unknown precision.
        """
        c, weight = self.config, self.proj_in.weight
        check_decoding(precision, PRECISIONS, weight)
        with torch.autocast(weight.device.type, enabled=False):  # precision says what is computed, not the surroundings
            check_floats("z", z, (None, c.tokens, c.channels), weight)
            check_labels(y, c.num_classes, z.shape[0], weight.device)
            guidance = check_number("guidance", guidance, minimum=0, single=True)
            if guidance > 0 and not c.num_classes:
                raise ValueError(f"guidance: expected 0 for a model without classes, got {guidance:g}")
            if c.max_guidance and guidance > c.max_guidance:
                raise ValueError(f"guidance: expected at most {c.max_guidance:g} (as trained), got {guidance:g}")
            w = None if y is None or not c.num_classes else torch.where(y < 0, 0.0, guidance).to(z.dtype)
            if c.max_guidance or guidance == 0 or y is None:
                x = self.passes("forward", precision, z, y, w if c.max_guidance else None)
            else:
                x = self.passes("_guided", precision, z, y, w)
            return unpatchify(x, c.patch_size)

    def _guided(self, z: Tensor, y: Tensor, w: Tensor, layer_dtype: torch.dtype | None = None) -> Tensor:
        """Guidance in two passes: G(z | y) + w (G(z | y) - G(z))."""
        x = self(z, y, layer_dtype=layer_dtype)
        return x + w[:, None, None] * (x - self(z, layer_dtype=layer_dtype))

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        *,
        guidance: float = 0.0,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        precision: str = "fp32",
    ) -> Tensor:
        """Draw n images in one pass each: z ~ N(0, temperature^2), then `decode` (clean only with learned_denoising).

        Args:
            n: number of images.
            y, guidance, precision: as in `decode`.
            temperature: standard deviation of z.
            generator: source of randomness; z is drawn on its device, or on the model's.

        Returns:
            (n,C,H,W) fp32, about [-1, 1], not clamped. Works under torch.no_grad() and torch.inference_mode().
        """
        c = self.config
        n = check_count("n", n)
        check_generator(generator)
        temperature = check_number("temperature", temperature, minimum=0, single=True)
        own = self.proj_in.weight.device
        device = own if generator is None else generator.device
        z = torch.randn(n, c.tokens, c.channels, generator=generator, device=device, dtype=torch.float32).to(own)
        return self.decode(temperature * z, y, guidance=guidance, precision=precision)

    def _class_tokens(self, y: Tensor | None, batch: int) -> Tensor:
        if y is None:
            return self.null_class.expand(batch, -1, -1)
        return torch.where((y < 0).view(-1, 1, 1), self.null_class, class_rows(self.class_embed, y, batch))
