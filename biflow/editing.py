"""Editing images with a trained flow, without training: inpainting, class editing, interpolation.

All of it is z = encode(x), a change of z or of the class, and a decode: by the learned inverse in one pass, or by the
exact inverse (BiFlow, arXiv 2512.10953, shows the first two). A flow that was trained with noise encodes noisy images,
so noise of the same std is added first, and the exact inverse ends with the score step of `TarFlow.sample`.

Noise is drawn image by image: with the same generator, an image's result depends on the images before it only through
their number, and a batch may be edited in parts.
"""

import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from biflow.config import check_number
from biflow.evaluate.metrics import check_pair
from biflow.models import BiFlow, TarFlow
from biflow.models.layers import check_count, check_floats, check_generator, check_labels, patchify

EXACT_ROUNDS = 4  # of inpainting with the exact inverse, unless told otherwise


@dataclass(frozen=True)
class Inpainted:
    """What `inpaint` returns.

    images: (B,C,H,W) fp32, about [-1, 1], not clamped.
    error, max_error: (B,) fp32, root mean square and maximum of |decoded - x| over an image's known pixels: of the
        clean decoded image before they were pasted into it. 0 for an image without known pixels.
    round_errors: (rounds,B), the root mean square error of each round's decode before its score step: of the exact
        inverse against x + noise, which is what it was asked to give back; of a learned inverse against x.
    z: (B,T,D), what the last round decoded.
    known_tokens: (B,T) bool.
    """

    images: Tensor
    error: Tensor
    max_error: Tensor
    round_errors: Tensor
    z: Tensor
    known_tokens: Tensor


def token_mask(mask: Tensor, patch_size: int) -> Tensor:
    """Pixels (B,1,H,W) bool -> tokens (B,T) bool: a token is known only if all of its pixels are."""
    return patchify(mask, patch_size).all(-1)


@torch.no_grad()
def inpaint(
    flow: TarFlow,
    x: Tensor,
    mask: Tensor,
    y: Tensor | None = None,
    context: Tensor | None = None,
    *,
    inverse: BiFlow | None = None,
    rounds: int | None = None,
    fill: float | Tensor = 0.0,
    keep_known: bool = True,
    noise_std: float | None = None,
    denoise: bool | None = None,
    generator: torch.Generator | None = None,
    **decode_options,
) -> Inpainted:
    """Fill in hidden pixels: z' = M z + (1 - M) eps, decoded (BiFlow, arXiv 2512.10953).

    M is the token mask, z = encode(x_known + noise, with `fill` + noise where x is hidden), eps ~ N(0, I). In an
    autoregressive flow the z of a known token depends on the tokens before it in each block, hidden ones among them,
    and so does its decoded value. One round therefore gives the known pixels back only approximately, and what it
    writes beside them was drawn for an image with `fill` in it. Further rounds paste the known pixels into the decoded
    image, encode that, and replace the z of the hidden tokens by the same eps: a fixed-point iteration for the x with
    the known pixels whose hidden tokens have the z eps. Where it converges `fill` has no influence left, and the exact
    inverse without guidance gives the known pixels back by itself. (Its pixels are plausible, but not samples of
    p(hidden | known): that density has a Jacobian factor more.) A learned inverse stops at its own reconstruction
    error, which takes two or three rounds, and guidance, which only the decode knows of, leaves an error too.

    Args:
        flow: the forward model, fp32.
        x: images (B,C,H,W) in [-1, 1] fp32. Hidden pixels are never read; they may be NaN.
        mask: bool, True where a pixel is known: (H,W), (1,1,H,W) or (B,1,H,W). Known pixels of tokens that are partly
            hidden are seen by the encoder and pasted, but their token is drawn anew.
        y, context: the condition, as in `TarFlow.encode`; for encode and decode. No context with an inverse.
        inverse: the learned inverse of this flow; None: the exact one.
        rounds: at least 1. None: 1 with an inverse (one pass), 4 without.
        fill: what the first round sees in place of hidden pixels, before noise: a number (0: middle gray), or a tensor
            that broadcasts to x, such as a draft.
        keep_known: put the known pixels of x, without noise, into the result; False: return it as it was decoded.
        noise_std: std of the noise added to x and fill, the same in each round; None: what the flow was trained with.
        denoise: end with the score step, x + noise_std^2 grad log p(x | y). None: iff the flow was trained with noise.
            An inverse with learned denoising ends in clean images by itself.
        generator: source of the noise, then of eps, of each image in turn; on its device, or on the model's.
        decode_options: of `TarFlow.decode` (but return_info), or with an inverse guidance and precision of
            `BiFlow.decode`; precision is that of the encode too.

    Returns:
        `Inpainted`. An image that overflowed on its way is NaN or infinite, but for the known pixels; its errors too.

    Raises:
        TypeError, ValueError: a mask of another dtype, shape or device, an inverse of another flow, an option that the
            way of decoding does not have, and what `encode` and `decode` refuse.
    """
    coder = _Coder(flow, inverse, noise_std, denoise, decode_options)
    c = flow.config
    x = coder.shaped("x", x)
    mask = _check_mask(mask, x)
    rounds = (EXACT_ROUNDS if inverse is None else 1) if rounds is None else check_count("rounds", rounds)
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if not isinstance(fill, Tensor):
        fill = x.new_tensor(check_number("fill", fill, single=True))
    try:
        start = torch.where(mask, x, fill.to(x))
        if start.shape != x.shape:
            raise RuntimeError
    except RuntimeError:
        raise ValueError(
            f"fill: expected a shape that broadcasts to {tuple(x.shape)}, got {tuple(fill.shape)}"
        ) from None
    coder.condition(y, context, len(x))
    noise, eps = coder.draw(len(x), (x[0].numel() if len(x) else 0, c.tokens * c.channels), generator)
    noise, eps = coder.noise_std * noise.view_as(x), eps.view(len(x), c.tokens, c.channels)
    known = token_mask(mask, c.patch_size).expand(len(x), -1)
    given = start + noise
    # what the decode should give back on known pixels, and what it lacks to be encoded again
    wanted, lacking = (given, torch.zeros_like(noise)) if not coder.decodes_clean else (start, noise)
    current, errors = given, []
    for _ in range(rounds):
        z = torch.where(known[:, :, None], coder.encode(current), eps)
        decoded = coder.decode(z)
        errors.append(_errors(decoded, wanted, mask)[0])
        going = _finite_rows(decoded)[:, None, None, None]
        current = torch.where(mask | ~going, given, decoded + lacking)
    decoded = coder.clean(decoded)
    error, max_error = _errors(decoded, start, mask)
    images = torch.where(mask, x, decoded) if keep_known else decoded
    return Inpainted(images, error, max_error, torch.stack(errors), z, known)


@torch.no_grad()
def edit_class(
    flow: TarFlow,
    x: Tensor,
    source: int | Tensor,
    target: int | Tensor,
    context: Tensor | None = None,
    *,
    inverse: BiFlow | None = None,
    noise_std: float | None = None,
    denoise: bool | None = None,
    generator: torch.Generator | None = None,
    **decode_options,
) -> Tensor:
    """Another class, the rest kept: decode(encode(x + noise, source), target) (BiFlow, arXiv 2512.10953).

    What z keeps of x is what the class does not explain: style, stroke, position. With source == target and no guidance
    the exact inverse gives x + noise back, before its score step.

    Args:
        x: images (B,C,H,W) in [-1, 1] fp32.
        source, target: classes in [0, num_classes), -1: no class; one for all images, or (B,) int64.
        flow, context, inverse, noise_std, denoise, generator, decode_options: as in `inpaint`.

    Returns:
        (B,C,H,W) fp32, about [-1, 1], not clamped; NaN or infinite where an image overflowed.

    Raises:
        TypeError, ValueError: as in `inpaint`; a model without classes, classes out of range.
    """
    coder = _Coder(flow, inverse, noise_std, denoise, decode_options)
    x = coder.shaped("x", x)
    for model in (flow, inverse):
        if model is not None and not model.config.num_classes:
            raise ValueError(f"edit_class: expected a {type(model).__name__} with classes, got num_classes = 0")
    labels = [_class_labels(name, k, flow, x) for name, k in (("source", source), ("target", target))]
    coder.condition(labels[0], context, len(x))
    z = coder.encode(x + coder.noise(x, generator))
    coder.condition(labels[1], context, len(x))
    return coder.clean(coder.decode(z))


@torch.no_grad()
def interpolate(
    flow: TarFlow,
    x_a: Tensor,
    x_b: Tensor,
    steps: int,
    y: Tensor | None = None,
    context: Tensor | None = None,
    *,
    inverse: BiFlow | None = None,
    spherical: bool = True,
    noise_std: float | None = None,
    denoise: bool | None = None,
    generator: torch.Generator | None = None,
    **decode_options,
) -> Tensor:
    """Images on the way from x_a to x_b: decode of points between their encodings z_a and z_b.

    Spherical, with the angle w between z_a and z_b as vectors of T D numbers: z_t = (sin((1-t) w) z_a + sin(t w) z_b)
    / sin w (Shoemake 1985), which keeps the length typical of Gaussian noise; parallel vectors are joined by a line.
    Linear: z_t = (1-t) z_a + t z_b, whose middle is shorter: smoother, less detailed images.

    Args:
        x_a, x_b: images (B,C,H,W) in [-1, 1] fp32.
        steps: images on the way, both ends included; at least 2: t = 0, 1/(steps-1), ..., 1.
        y: one class for both ends and all between, (B,) int64; -1 or None: no class, for ends of different classes.
        spherical: as above.
        flow, context, inverse, noise_std, denoise, generator, decode_options: as in `inpaint`.

    Returns:
        (B,steps,C,H,W) fp32, about [-1, 1], not clamped; NaN or infinite where an image overflowed. Exact and without
        guidance the ends are x_a + noise and x_b + noise, before the score step.

    Raises:
        TypeError, ValueError: as in `inpaint`; x_a and x_b of different shapes, less than two steps.
    """
    coder = _Coder(flow, inverse, noise_std, denoise, decode_options)
    x_a, x_b = coder.shaped("x_a", x_a), coder.shaped("x_b", x_b)
    if x_a.shape != x_b.shape:
        raise ValueError(f"x_b: expected shape {tuple(x_a.shape)}, that of x_a; got {tuple(x_b.shape)}")
    if check_count("steps", steps) < 2:
        raise ValueError(f"steps: expected at least 2 (both ends), got {steps}")
    coder.condition(y, context, len(x_a))
    pair = torch.stack([x_a, x_b], 1)
    noisy = pair + coder.noise(pair, generator)
    z_a, z_b = coder.encode(noisy[:, 0]), coder.encode(noisy[:, 1])
    t = torch.linspace(0, 1, steps, device=x_a.device)[:, None, None]
    z = _slerp(z_a[:, None], z_b[:, None], t) if spherical else torch.lerp(z_a[:, None], z_b[:, None], t)
    rows = torch.arange(len(x_a), device=x_a.device).repeat_interleave(steps)
    coder.condition(*(None if v is None else v[rows] for v in (y, context)), len(rows))
    return coder.clean(coder.decode(z.flatten(0, 1))).unflatten(0, (len(x_a), steps))


class _Coder:
    """encode, decode and the score step of a flow with or without its learned inverse, under one condition.

    Rows that overflow stay NaN or infinite; the models themselves refuse such values for the whole batch.
    """

    def __init__(
        self, flow: TarFlow, inverse: BiFlow | None, noise_std: float | None, denoise: bool | None, options: dict
    ):
        for name, model, kind in (("flow", flow, TarFlow), ("inverse", inverse, BiFlow)):
            if not isinstance(model, kind) and not (name == "inverse" and model is None):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {type(model).__name__}")
        if denoise is not None and not isinstance(denoise, bool):
            raise TypeError(f"denoise: expected True, False or None, got {type(denoise).__name__} {denoise!r}")
        if "return_info" in options:
            raise ValueError("return_info: expected in decode or sample, not in editing")
        trained = flow.config.noise_std
        if inverse is not None:
            check_pair(inverse, flow)
            for name in [n for n in options if n not in ("guidance", "precision")]:
                raise ValueError(f"{name}: expected with the exact inverse only; a learned inverse has one pass")
        self.decodes_clean = inverse is not None and inverse.config.learned_denoising
        if self.decodes_clean and denoise is not None:
            raise ValueError(f"denoise: expected None with an inverse that has learned denoising, got {denoise}")
        if denoise and trained == 0:
            raise ValueError("denoise: expected a model with noise_std > 0, got noise_std = 0")
        self.flow, self.inverse, self.options = flow, inverse, options
        self.denoise = not self.decodes_clean and (trained > 0 if denoise is None else denoise)
        self.noise_std = trained if noise_std is None else check_number("noise_std", noise_std, minimum=0, single=True)
        self.y = self.context = None

    def shaped(self, name: str, x: Tensor) -> Tensor:
        """x, after a look at dtype, device and shape; hidden values may be NaN, so `encode` looks at those."""
        c = self.flow.config
        if isinstance(x, Tensor) and x.is_floating_point():
            check_floats(name, torch.zeros_like(x), (None, c.in_channels, c.img_size, c.img_size), self.flow.var)
        else:
            check_floats(name, x, (None,) * 4, self.flow.var)
        return x

    def condition(self, y: Tensor | None, context: Tensor | None, batch: int) -> None:
        """What the next encodes and decodes are conditioned on."""
        if self.inverse is not None:
            if context is not None:
                raise ValueError("context: expected None with a learned inverse, which takes none; got a tensor")
            check_labels(y, self.inverse.config.num_classes, batch, self.flow.var.device)
        self.y, self.context = y, context

    @property
    def flow_y(self) -> Tensor | None:
        """The flow's labels; as in the training of an inverse with classes, a flow may do without."""
        return self.y if self.inverse is None or self.flow.config.num_classes else None

    def draw(self, batch: int, sizes: tuple[int, ...], generator: torch.Generator | None) -> list[Tensor]:
        """N(0, 1), one (batch, n) for each n of sizes; all of an image before the next."""
        check_generator(generator)
        own = self.flow.var.device
        options = {
            "generator": generator,
            "dtype": torch.float32,
            "device": own if generator is None else generator.device,
        }
        rows = [torch.randn(sum(sizes), **options) for _ in range(batch)]
        drawn = torch.stack(rows) if rows else torch.empty(0, sum(sizes))
        return list(drawn.to(own).split(sizes, dim=1))

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """noise_std N(0, 1) in the shape of x."""
        (noise,) = self.draw(len(x), (x[0].numel() if len(x) else 0,), generator)
        return self.noise_std * noise.view_as(x)

    def encode(self, x: Tensor) -> Tensor:
        precision = self.options.get("precision", "fp32")
        return self.flow.encode(x, self.flow_y, self.context, precision=precision)[0]

    def decode(self, z: Tensor) -> Tensor:
        if self.inverse is not None:
            return self._finite(lambda z: self.inverse.decode(z, self.y, **self.options), z)
        return self._finite(lambda z: self.flow.decode(z, self.y, self.context, **self.options), z)

    def clean(self, x: Tensor) -> Tensor:
        return self._finite(lambda x: self.flow.denoise(x, self.y, self.context), x) if self.denoise else x

    @staticmethod
    def _finite(call: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """call(value), NaN for the rows of value that are not finite."""
        ok = _finite_rows(value).view(-1, *[1] * (value.dim() - 1))
        result = call(torch.where(ok, value, 0.0))
        return torch.where(ok.view(-1, *[1] * (result.dim() - 1)), result, torch.nan)


def _check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as (1,1,H,W) or (B,1,H,W)."""
    batch, _, height, width = x.shape
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, True where a pixel is known; got {got}")
    shapes = ((height, width), (1, 1, height, width), (batch, 1, height, width))
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"mask: expected shape ({height}, {width}) or (1 or {batch}, 1, {height}, {width}), got {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask: expected a tensor on {x.device}, where x is; got one on {mask.device}")
    return mask.view(-1, 1, height, width)


def _class_labels(name: str, value: int | Tensor, flow: TarFlow, x: Tensor) -> Tensor:
    """One class, or one for each image, as (B,) int64."""
    classes = flow.config.num_classes
    if isinstance(value, Tensor):
        try:
            check_labels(value, classes, len(x), x.device)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        return value
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int or an int64 tensor, got {type(value).__name__} {value!r}")
    if not -1 <= value < classes:
        raise ValueError(f"{name}: expected a class in [0, {classes}) or -1 (no class), got {value}")
    return torch.full((len(x),), int(value), device=x.device)


def _errors(decoded: Tensor, wanted: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square and maximum of |decoded - wanted| over the known pixels of each image, (B,); 0 without any."""
    mask = mask.expand_as(decoded).flatten(1)
    difference = torch.where(mask, (decoded - wanted).flatten(1), 0.0)
    mean = difference.square().sum(1) / mask.sum(1).clamp_min(1)
    return mean.sqrt(), difference.abs().amax(1)


def _slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Points between a and b (B,1,T,D) on the great circle, t (steps,1,1); on the line where they are parallel."""
    wide_a, wide_b = a.double(), b.double()
    dims = (-2, -1)
    norms = wide_a.square().sum(dims, True).sqrt() * wide_b.square().sum(dims, True).sqrt()
    angle = ((wide_a * wide_b).sum(dims, True) / norms.clamp_min(1e-300)).clamp(-1, 1).acos()
    straight = angle.sin() < 1e-6
    angle = torch.where(straight, 1.0, angle)
    on_circle = (((1 - t) * angle).sin() * wide_a + (t * angle).sin() * wide_b) / angle.sin()
    return torch.where(straight, torch.lerp(wide_a, wide_b, t.double()), on_circle).to(a.dtype)


def _finite_rows(x: Tensor) -> Tensor:
    return torch.isfinite(x).flatten(1).all(1)
