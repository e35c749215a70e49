"""The raw affine parameters of a window of tokens of one flow block, in one parallel pass over packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from biflow import _library  # noqa: F401
from biflow.ops._arrays import takes_arrays
from biflow.ops._block_pass import BlockPass
from biflow.ops._checks import check_beside, check_buffer, check_window
from biflow.ops.decode_block import BlockConfig, BlockWeights, Condition, check_block_call, condition


def _raw_columns(config: BlockConfig) -> int:
    return config.channels if config.shift_only else 2 * config.channels


def _options(weights: BlockWeights, given: Condition) -> dict[str, object]:
    affine = weights.affine_options
    return dict(weights.shape_options, layout=affine["layout"], flip=affine["flip"], **given.options)


@takes_arrays
def block_params(
    x: Tensor,
    weights: BlockWeights,
    config: BlockConfig,
    *,
    y: Tensor | None = None,
    context: Tensor | None = None,
    null_context: Tensor | None = None,
    guidance: float = 0.0,
    guide: str = "ab",
    anneal: bool = True,
    attn_temp: float = 1.0,
) -> Tensor:
    """The raw parameters of every token of x in one parallel pass: what encode needs of a block.

    Row n belongs to token n: the causal transformer's output from x_0 .. x_{n-1} in block order (0 for n = 0 without a
    start token), so the affine ops take it with causal=False. On a CPU each sample's result is bitwise the same in any
    batch and for any number of threads; on a GPU the pass is made of torch's matrix products, `attention`, `norm` and
    `gate`, and its bits may depend on the batch.

    x: (B, T, D) float32 in data order. weights, config, y, context, null_context, guidance, guide, anneal, attn_temp:
    as in `decode_block`; guided parameters are mixed before clip and scale map.
    Returns (B, T, 2D) float32, (B, T, D) with shift_only, in data order, in the layout of the config. No gradient:
    train through the model.
    Raises TypeError for wrong types and dtypes, ValueError for wrong shapes, options and devices, RuntimeError where a
    gradient is wanted.

    Source: TARFlow, arXiv 2412.06329, section 2; guidance: section 3.5.
    """
    check_block_call("x", x, weights, config, y, context, null_context, guidance, guide, anneal, attn_temp)
    raw = torch.empty(x.shape[0], config.tokens, _raw_columns(config), dtype=x.dtype, device=x.device)
    check_buffer("raw", raw, tuple(raw.shape), (x, context, null_context))
    given = condition(weights, x.shape[0], y, context, null_context, guidance, guide, anneal, attn_temp)
    if weights.plain is not None:
        whole = BlockPass(weights, given, x.shape[0])
        whole.prefill()
        whole(x, 0, config.tokens)
        return whole.raw
    torch.ops.biflow.block_params_(
        x.contiguous(), weights.packed, *given.tensors, raw, None, start=0, stop=config.tokens,
        **_options(weights, given),
    )  # fmt: skip
    return raw


class BlockWindows:
    """Raw parameters of windows of tokens, with the keys and values of all tokens kept between calls.

    Windows are in block order: tokens start <= n < stop. A call evaluates the tokens that the window's parameters come
    from (n, or n - 1 without a start token), reads keys and values of the tokens before them as the last call that
    evaluated those left them, and leaves its own. So windows are walked from the first token on, each as often as
    wanted. All buffers are allocated here; a call allocates nothing that outlives it, and a CUDA graph may record it.

    Arguments and errors as in `block_params`; batch: B.
    """

    def __init__(
        self,
        weights: BlockWeights,
        config: BlockConfig,
        batch: int,
        *,
        y: Tensor | None = None,
        context: Tensor | None = None,
        null_context: Tensor | None = None,
        guidance: float = 0.0,
        guide: str = "ab",
        anneal: bool = True,
        attn_temp: float = 1.0,
    ):
        if not isinstance(batch, int) or isinstance(batch, bool):
            raise TypeError(f"batch: expected an int, got {type(batch).__name__} {batch!r}")
        if batch < 0:
            raise ValueError(f"batch: expected an int >= 0, got {batch}")
        shape = (batch, config.tokens, config.channels)
        if not isinstance(weights, BlockWeights):
            raise TypeError(f"weights: expected the result of pack_block, got {type(weights).__name__}")
        x = torch.empty(1, dtype=torch.float32, device=weights.device).expand(shape)
        check_block_call("x", x, weights, config, y, context, null_context, guidance, guide, anneal, attn_temp)
        self.config = config
        self._weights = weights
        self._given = condition(weights, batch, y, context, null_context, guidance, guide, anneal, attn_temp)
        self._options = _options(weights, self._given)
        self._reads = (context, null_context)
        self._pass = None if weights.plain is None else BlockPass(weights, self._given, batch)
        if self._pass is not None:
            self._pass.prefill()
            self.raw = self._pass.raw
            return
        words = torch.ops.biflow.block_cache_size(
            prefix_tokens=self._given.prefix_tokens,
            tokens=config.tokens,
            width=config.width,
            layers=config.layers,
            head_dim=config.head_dim,
            precision=weights.precision,
        )
        self._cache = weights.packed.new_zeros(batch * self._given.passes, words)
        self.raw = weights.packed.new_zeros(batch, config.tokens, _raw_columns(config))  # in data order; calls write it

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor:
        """`raw`, (B, T, 2D) or (B, T, D), with the rows of the window written. x: (B, T, D), contiguous, in data order.

        Raises TypeError and ValueError for an x or a window that does not fit, RuntimeError where a gradient is wanted.
        """
        check_buffer("x", x, (self.raw.shape[0], self.config.tokens, self.config.channels), self._reads)
        check_beside("x", x, self.raw.device, "weights")
        check_window(start, stop, self.config.tokens)
        if self._pass is not None:
            self._pass(x, start, stop)
            return self.raw
        torch.ops.biflow.block_params_(
            x, self._weights.packed, *self._given.tensors, self.raw, self._cache, start=start, stop=stop,
            **self._options,
        )  # fmt: skip
        return self.raw


@torch.library.register_fake("biflow::block_params_")
def _(x, packed, added, prefix, null_added, null_prefix, raw, cache, **options):
    return None
