"""TarFlow: a stack of causal transformer blocks, each an affine autoregressive flow over image patches.

The maths is TARFlow's (Zhai et al. 2024, arXiv 2412.06329, section 3); the configuration also covers what its
successors use: a learned start token, clipped parameters and softplus scales (STARFlow, arXiv 2506.06276), rotary
positions, RMSNorm, SwiGLU, QK-norm and in-context class tokens (BiFlow, arXiv 2512.10953).
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from biflow import solvers
from biflow.config import check_fields, check_number
from biflow.models.block import Block
from biflow.models.classify import classify
from biflow.models.layers import (
    check_count,
    check_decoding,
    check_floats,
    check_generator,
    check_grid,
    check_kernels,
    check_labels,
    check_pairs,
    check_size,
    check_transformer,
    device_name,
    mlp_width,
    patchify,
    unpatchify,
)
from biflow.models.passes import PassModule
from biflow.ops import BlockConfig

LARGEST_HEAD = 256  # of ops.decode_block


@dataclass(frozen=True)
class TarFlowConfig:
    """Shape and options of a TarFlow.

    img_size, in_channels, patch_size: images (in_channels, img_size, img_size); T = (img_size / patch_size)^2 tokens of
        D = in_channels patch_size^2 channels.
    width, head_dim, mlp_ratio: C, d (at most 256), and the MLP's hidden width over C (rounded to a multiple of 8).
    num_blocks, layers_per_block: flow blocks, and layers in each: one number, or one per block in encode order (the
        deep-shallow design of STARFlow is (2, 2, 2, 2, 2, 24)).
    num_classes, class_tokens: classes (0: none); class_tokens = 0 adds the class embedding to every token, K > 0 puts K
        class tokens before the sequence.
    context_dim: channels of `context` tokens put before the sequence (0: the model takes no context).
    noise_std: standard deviation of the Gaussian noise the model is trained with; > 0 turns on denoising in `sample`.
    norm, gate, qk_norm, rope, pos_embed: the layer's variants (models/layers.py); pos_embed is the learned table.
    start_token: a learned first token replaces the shift by one, so that all T tokens transform.
    shift_only: z = x - shift (TARFlow's nvp=False), with a prior variance `var` (T, D) that training moves.
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
        check_fields(self)
        check_grid(self.img_size, self.in_channels, self.patch_size)
        check_size("num_blocks", self.num_blocks)
        layers = self.layers_per_block
        if isinstance(layers, tuple) and len(layers) != self.num_blocks:
            raise ValueError(f"layers_per_block: expected {self.num_blocks} numbers (num_blocks), got {len(layers)}")
        for count in layers if isinstance(layers, tuple) else (layers,):
            check_size("layers_per_block", count)
        check_transformer(self.width, self.head_dim, self.mlp_ratio, self.norm, self.gate, largest_head=LARGEST_HEAD)
        for name in ("num_classes", "class_tokens", "context_dim"):
            check_size(name, getattr(self, name), 0)
        check_number("noise_std", self.noise_std, minimum=0)
        if self.class_tokens and not self.num_classes:
            raise ValueError(f"class_tokens: expected 0 when num_classes is 0, got {self.class_tokens}")
        if self.shift_only and (self.scale != "exp" or self.clip_on != "both"):
            raise ValueError("shift_only: has no scale, so scale='exp' and clip_on='both' are expected")
        self.block(0)  # refuses a scale, clip or clip_on that the ops do not have

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
            mlp_hidden=mlp_width(self.mlp_ratio, self.width),
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


class TarFlow(PassModule):
    """The forward model. encode: data to noise in one parallel pass; decode: its exact inverse, by one of the solvers.

    log p(x) = log N(z; 0, I) + log|det dz/dx| (arXiv 2412.06329, eq. 5), with z and logdet from `encode`.
    """

    def __init__(self, config: TarFlowConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config.block(i), config.context_dim) for i in range(config.num_blocks))
        # variance of the prior: ones, which `update_prior` moves for shift_only models
        self.register_buffer("var", torch.ones(config.tokens, config.channels))
        # which solver is fastest for which block, from `biflow.calibrate`; what solver="auto" follows
        self.policy: solvers.Policy | None = None

    def encode(
        self,
        x: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        *,
        return_states: bool = False,
        features: Collection[tuple[int, int]] = (),
        precision: str | None = None,
    ) -> tuple:
        """Data to noise.

        Args:
            x: images (B,C,H,W) in [-1, 1], of the model's dtype.
            y: class labels (B,) int64; -1 or None: unconditional (the mean class embedding).
            context: (B,S,context_dim) of x's dtype, or None (one learned null token).
            return_states: also return the trajectory.
            features: (block, layer) pairs of which to return the features too, as `pseudo_reverse` has them.
            precision: None: the differentiable pass, in x's dtype. "fp32", "bf16": for fp32 models, faster
                (docs/results.md), no gradient: on a CPU by the packed kernels of `decode`, on a GPU as a CUDA graph
                (`Passes`). In bf16 the layers' weights, and what they multiply, are rounded; z and logdet are fp32.

        Returns:
            z (B,T,D) in x's dtype; logdet (B,) = log|det dz/dx| in nats, fp32 (fp64 for fp64 x); with return_states the
            list x_0, ..., x_B, each (B,T,D) in data order, x_0 the patches of x and x_B = z; with features, last, the
            residual stream (B,T,C) after each of those layers, by (block, layer), in data order.

        Raises:
            TypeError, ValueError: wrong dtype, device or shape, labels out of range, NaN or infinite values (values
                are not looked at inside torch.compile), a block or layer that is not there, features with a precision.
        """
        c, weight = self.config, self.blocks[0].proj_in.weight
        check_kernels(weight)
        check_floats("x", x, (None, c.in_channels, c.img_size, c.img_size), weight)
        self._check_condition(y, context, x.shape[0])
        features = check_pairs("features", features, self.blocks)
        if precision is None:
            return self(x, y, context, return_states=return_states, features=features)
        if features:
            raise ValueError(f"precision: expected None with features, got {precision!r}")
        check_decoding(precision, solvers.PRECISIONS, weight)
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise RuntimeError(
                f"precision: expected None where a gradient is wanted, or torch.no_grad() around; got {precision!r}"
            )
        with torch.autocast(weight.device.type, enabled=False):
            if weight.device.type != "cpu":
                return self.passes("forward", precision, x, y, context, return_states=return_states)
            states, logdet = [patchify(x, c.patch_size)], 0.0
            for block in self.blocks:
                h, block_logdet = block.encode_packed(states[-1], solvers.Condition(y, context, precision=precision))
                states, logdet = [*(states if return_states else ()), h], logdet + block_logdet
            return self._to_prior(states, logdet, return_states)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        *,
        return_states: bool = False,
        layer_dtype: torch.dtype | None = None,
        classes: Sequence[Tensor] | None = None,
        features: Collection[tuple[int, int]] = (),
    ) -> tuple:
        """`encode` without its checks. layer_dtype, classes (one tensor a block): as in `Block.params`."""
        h = patchify(x, self.config.patch_size)
        states, flipped, logdet, kept = [h], False, 0.0, {}
        for index, (block, rows) in enumerate(zip(self.blocks, classes or [None] * len(self.blocks), strict=True)):
            if block.config.flip != flipped:
                h, flipped = h.flip(1), block.config.flip
            layers = [layer for wanted, layer in features if wanted == index]
            h, block_logdet, found = block(h, y, context, layer_dtype, rows, layers)
            logdet = logdet + block_logdet
            kept |= {(index, layer): f.flip(1) if flipped else f for layer, f in found.items()}
            if return_states:
                states.append(h.flip(1) if flipped else h)
        states[-1] = h.flip(1) if flipped else h
        return *self._to_prior(states, logdet, return_states), *([kept] if features else ())

    def _to_prior(self, states: list[Tensor], logdet: Tensor, return_states: bool):
        """The result of `encode` from the trajectory: its last state scaled to unit variance."""
        z = states[-1] * self.var.rsqrt().to(states[-1].dtype)
        logdet = logdet - 0.5 * self.var.to(logdet.dtype).log().sum()
        return (z, logdet, [*states[:-1], z]) if return_states else (z, logdet)

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None, *, precision: str | None = None
    ) -> Tensor:
        """log p(x | y), (B,), nats: -|z|^2 / 2 - (T D / 2) log 2 pi + logdet. Arguments and errors as `encode`."""
        return self._log_prob(*self.encode(x, y, context, precision=precision))

    @staticmethod
    def _log_prob(z: Tensor, logdet: Tensor) -> Tensor:
        wide = z.to(logdet.dtype).flatten(1)
        return logdet - 0.5 * (wide.square().sum(1) + wide.shape[1] * math.log(2 * math.pi))

    def bits_per_dim(
        self,
        x: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        *,
        bin_width: float = 2 / 256,
        precision: str | None = None,
    ) -> Tensor:
        """-log_prob / (T D ln 2) - log2(bin_width), (B,): bits a channel of data quantised to steps of `bin_width`.

        x must be dequantised: uniform noise over one bin added. 8-bit images in [-1, 1] have bins of 2/256.
        """
        bin_width = check_number("bin_width", bin_width, above=0)
        dims = self.config.tokens * self.config.channels
        return -self.log_prob(x, y, context, precision=precision) / (dims * math.log(2)) - math.log2(bin_width)

    def classify(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        rule: str = "gradient",
        noise_draws: int = 0,
        top_k: int | None = None,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Which class x is of, without training a classifier: the model's own likelihood says (arXiv 2511.22345, 4.1).

        Args:
            x, context: as in `encode`; computed in x's dtype, also inside torch.autocast.
            rule: "gradient": g = grad log p(x | e) with respect to logits l in R^K at l = 0, where e = softmax(l)^T E
                mixes the class embeddings E. One encode and one backward pass, whatever K is. "bayes": log p(x | k) of
                every class, K encodes.
            noise_draws: 0: x as it is. n: the mean of the scores of x + noise_std N(0, 1) over n draws, which is what a
                model with noise_std > 0 has seen in training; n times the work.
            top_k: also return labels, the best k.
            batch_size: images of a pass, which bounds the memory.
            generator: source of the noise, drawn on its device, or on the model's.

        Returns:
            scores (B,K), fp32 (fp64 for fp64 x), in nats: g, whose sum is 0 and whose K-fold is the first-order term of
            log p(x | k) - log p(x | e), so that softmax(K g) is the posterior of a likelihood that is linear in e; or
            log p(x | k), whose softmax is the posterior if all classes are as likely. With top_k labels (B,k) int64 and
            their scores (B,k), best first. Neither has a graph; no parameter gets a gradient. Works under
            torch.no_grad() and torch.inference_mode().

        Raises:
            TypeError, ValueError: as `encode`; a model without classes, in bf16 or fp16; an unknown rule, draws of a
            model without noise, top_k above K. FloatingPointError: scores that are not finite.
        """
        return classify(
            self,
            x,
            context,
            rule=rule,
            noise_draws=noise_draws,
            top_k=top_k,
            batch_size=batch_size,
            generator=generator,
        )

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
            z: (B,T,D) fp32, on the model's device.
            y, context: the condition, as in `encode`. Where y is -1 guidance acts only through attn_temp. The
                unconditional pass sees as many null tokens as context has.
            solver: how each block is inverted. "sequential": token by token. "jacobi": all tokens at once, iterated to
                a fixed point. "windowed": Jacobi inside windows of tokens, window after window (GS-Jacobi, arXiv
                2505.12849). "auto": by block, what `self.policy` says is fastest, or sequential without a policy.
            window: tokens a window, at least 1; only with "windowed" (None: 16). T and more make it Jacobi.
            guidance: g >= 0; 0 means none. At each token the raw parameters become r + w (r - r_u) with r_u of an
                unconditional pass (arXiv 2412.06329, section 3.5).
            guide: which parameters are guided: "a" (scale), "b" (shift) or "ab".
            anneal: w = g t / max(T - 1, 1) for the token of index t in block order; False: w = g.
            attn_temp: divides the attention logits of the unconditional pass; what guidance uses without classes.
            precision: "fp32", or "bf16": weights, activations that they multiply, keys and values are rounded to bf16,
                sums, parameters and x stay fp32; x is then off by about 1e-2 (docs/results.md). The same inside
                torch.autocast.
            tol: tolerance of the iterative solvers, for the last update and the residual of each value v, both
                relative to max(1, |v|). In precision "bf16" those below 1e-2 count as 1e-2. Samples that do not get
                there in time, because the coupling of their tokens is too strong or because tol is below rounding,
                are decoded sequentially, which is exact and ignores tol. tol bounds the residual of each block; the
                next may amplify what is left. On a CPU a sample of the sequential solver has the same bits in every
                batch (on a GPU the order of some sums follows its size), one of the others is the same up to tol:
                passes go on until the last sample has converged.
            return_info: also return a `solvers.DecodeInfo` with the residual of each sample, and the solver, passes and
                fallbacks of each block; costs one encode, two with guidance.

        Returns:
            x (B,C,H,W) fp32, not clamped, infinite or NaN where strong guidance overflowed; with return_info (x, info).

        Raises:
            TypeError, ValueError: wrong dtype, device or shape, NaN in z, an unknown solver or precision, a window
                without "windowed", negative guidance, a policy for another number of blocks.
        """
        c, weight = self.config, self.blocks[0].proj_in.weight
        asked = solvers.check_options(solver, window, tol)
        strength = solvers.Guidance(guidance, guide, anneal, attn_temp)
        check_decoding(precision, solvers.PRECISIONS, weight)
        check_kernels(weight)
        with torch.autocast(weight.device.type, enabled=False):  # precision says what is computed, not the surroundings
            check_floats("z", z, (None, c.tokens, c.channels), weight)
            self._check_condition(y, context, z.shape[0])
            x = z * self.var.sqrt()
            condition = solvers.Condition(y, context, strength, precision)
            plan = solvers.methods(
                asked,
                self.policy,
                len(self.blocks),
                x.device.type,
                x.shape[0],
                condition,
                tol,
                name=lambda: device_name(x.device),
                threads=torch.get_num_threads(),
            )
            x, info = solvers.decode(self.blocks, x, condition, plan, tol, certify=return_info)
            x = unpatchify(x, c.patch_size)
        return (x, info) if return_info else x

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Many decodes with the same weights: `with flow.frozen(): ...`.

        Outside, every decode looks whether a weight has changed since it was packed, by whatever way (a hash of all
        weights: as long as a step or two of the decode). Inside it looks once; weights must not change.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().frozen())
            for block in self.blocks:
                stack.enter_context(block.frozen())
            yield

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        denoise: bool | None = None,
        generator: torch.Generator | None = None,
        return_info: bool = False,
        **decode_options,
    ) -> Tensor | tuple[Tensor, solvers.DecodeInfo]:
        """Draw n images: z ~ N(0, temperature^2), decode, and remove the training noise by one score step.

        Args:
            n: number of images.
            y, context: the condition, as in `encode`.
            temperature: standard deviation of z.
            denoise: x + noise_std^2 grad log p(x | y) (arXiv 2412.06329, section 3.4). None: iff noise_std > 0.
            generator: source of randomness; z is drawn on its device, or on the model's.
            return_info: also return what `decode` says of itself, from z to the images before the score step.
            decode_options: passed to `decode`.

        Returns:
            (n,C,H,W) fp32, about [-1, 1], not clamped; with return_info (images, info). Works under torch.no_grad() and
            torch.inference_mode().
        """
        c = self.config
        n = check_count("n", n)
        check_generator(generator)
        temperature = check_number("temperature", temperature, minimum=0, single=True)
        if denoise is not None and not isinstance(denoise, bool):
            raise TypeError(f"denoise: expected True, False or None, got {type(denoise).__name__} {denoise!r}")
        denoise = c.noise_std > 0 if denoise is None else denoise
        if denoise and c.noise_std == 0:
            raise ValueError("denoise: expected a model with noise_std > 0, got noise_std = 0")
        device = self.var.device if generator is None else generator.device
        z = torch.randn(n, c.tokens, c.channels, generator=generator, device=device, dtype=torch.float32)
        z = temperature * z.to(self.var.device)
        x = self.decode(z, y, context, return_info=return_info, **decode_options)
        x, *info = x if return_info else (x,)
        x = self._denoise(x, y, context) if denoise else x
        return (x, *info) if return_info else x

    def denoise(self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """x + noise_std^2 grad_x log p(x | y), (B,C,H,W): the clean data's posterior mean under the model (Tweedie).

        Arguments and errors as `encode`. Computed in x's dtype, also inside torch.autocast; the result has no graph.
        """
        c, weight = self.config, self.blocks[0].proj_in.weight
        check_kernels(weight)
        with torch.autocast(weight.device.type, enabled=False):
            check_floats("x", x, (None, c.in_channels, c.img_size, c.img_size), weight)
        self._check_condition(y, context, x.shape[0])
        return self._denoise(x, y, context)

    def _denoise(self, x: Tensor, y: Tensor | None, context: Tensor | None) -> Tensor:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.var.device.type, enabled=False),
        ):
            # autograd takes no inference tensors, be they arguments or weights: copies of them are ordinary
            leaf = x.detach().clone().requires_grad_()
            y, context = (None if t is None else t.detach().clone() for t in (y, context))
            named = [*self.named_parameters(), *self.named_buffers()]
            copies = {name: t.detach().clone() for name, t in named if t.is_inference()}
            z, logdet = torch.func.functional_call(self, copies, (leaf, y, context))
            (score,) = torch.autograd.grad(self._log_prob(z, logdet).sum(), leaf)
            return (leaf + self.config.noise_std**2 * score).detach()

    @torch.no_grad()
    def update_prior(self, z: Tensor, rate: float = 0.1, mean: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        """Move `var` a step of `rate` towards the second moment of z sqrt(var) over the batch; for shift_only models.

        z (B,T,D), B >= 1, as `encode` returned it: after the step an encode of that batch is nearer to unit variance.
        mean: of a tensor over processes that have equal parts of the batch.
        """
        c = self.config
        if not c.shift_only:
            raise ValueError("update_prior: expected a shift_only model, whose prior variance is learned")
        if z.dim() != 3 or z.shape[0] < 1 or z.shape[1:] != self.var.shape:
            raise ValueError(f"z: expected shape (at least 1, {c.tokens}, {c.channels}), got {tuple(z.shape)}")
        self.var.lerp_(mean(z.to(self.var.dtype).square().mean(0)) * self.var, rate)

    def _check_condition(self, y: Tensor | None, context: Tensor | None, batch: int) -> None:
        weight = self.blocks[0].proj_in.weight
        check_labels(y, self.config.num_classes, batch, weight.device)
        if context is not None:
            if not self.config.context_dim:
                raise ValueError("context: expected None for a model with context_dim=0, got a tensor")
            check_floats("context", context, (batch, None, self.config.context_dim), weight)
