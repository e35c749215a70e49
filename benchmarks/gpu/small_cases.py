"""Every GPU op on a few tokens: what compute-sanitizer gets, under which the tests would take hours."""

import torch

from biflow import ops
from biflow.ops.decode_block import block_shapes

# heads, tokens, d, causal, dtype
ATTENTION = (
    (2, 83, 64, True, torch.bfloat16),
    (1, 200, 32, False, torch.float16),
    (1, 70, 128, False, torch.bfloat16),
    (1, 460, 128, False, torch.bfloat16),  # more keys than shared memory holds
)
# [persistent, row_tiles, blocks, splits, warps, norm_in_place] by csrc/decode_block.h
DECODES = ([1, 1, 3, 1, 8, 1], [0, 1, 3, 3, 8, 1], [1, 2, 4, 1, 2, 0], [0, 4, 2, 1, 1, 0])
# of 330 tokens, by csrc/attention.h: streamed, two tiles of rows a warp, both
PLANS = ([1, 4, 6, 3], [2, 2, 6, 6], [2, 4, 3, 3])


def main() -> None:
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=g, device="cuda").to(dtype)

    for shape, options in (((2, 70, 12), {"flip": True}), ((2, 5, 7), {"layout": "interleaved", "causal": False})):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = randn(*shape, dtype=dtype).requires_grad_()
            params = randn(*shape[:2], 2 * shape[2], dtype=dtype).requires_grad_()
            mask = torch.rand(shape[:2], generator=g, device="cuda") > 0.3
            z, logdet = ops.affine_encode(x, params, mask=mask, **options)
            torch.autograd.grad(z.sum() + logdet.sum(), (x, params))
            ops.affine_decode(z.detach(), params.detach(), mask=mask, **options)
    for kind, gate, shape in (("layernorm", "gelu", (5, 130)), ("rmsnorm", "swiglu", (600, 600))):
        x = randn(*shape, dtype=torch.bfloat16).requires_grad_()
        h, weight = randn(*shape).requires_grad_(), randn(shape[1]).requires_grad_()
        y, h_out = ops.add_norm(x, h, weight, weight if kind == "layernorm" else None, kind=kind, eps=1e-5)
        y = ops.norm(ops.gate(y, gate)[:, : shape[1] // 2], weight[: shape[1] // 2], kind=kind, eps=1e-5)
        torch.autograd.grad(y.sum() + h_out.sum(), (x, h, weight))
    for dtype, shape in ((None, (2, 20, 130, 5)), (torch.bfloat16, (3, 150, 768, 40))):
        h, target = randn(*shape[:3]).requires_grad_(), randn(*shape[:2], shape[3])
        weight, head = randn(shape[2]).requires_grad_(), randn(shape[3], shape[2]).requires_grad_()
        options = {"scale": target[:, 1:, 0], "kind": "layernorm", "eps": 1e-5, "dtype": dtype}
        error = ops.alignment_error(h[:, 1:], target[:, 1:], weight, weight, head, head[:, 0], **options)
        torch.autograd.grad(error.sum(), (h, weight, head))
    for shape, layout in (((2, 700, 12), "scale_shift"), ((9, 5, 7), "interleaved")):
        x, z, raw, moved = randn(*shape), randn(*shape), randn(*shape[:2], 2 * shape[2]), randn(2, shape[0])
        ops.jacobi_update_(x, z, raw, moved, start=1, stop=shape[1], layout=layout, flip=True)
    with torch.no_grad():
        for heads, tokens, d, causal, dtype in ATTENTION:
            qkv = randn(2, tokens, 3 * heads * d, dtype=dtype)
            angle = randn(tokens - 3, d // 2)
            weight = randn(d)
            mask = torch.rand((2, tokens), generator=g, device="cuda") > 0.3
            ops.attention_qkv(qkv, heads=heads, causal=causal, q_norm=weight, k_norm=weight,
                              rope=(angle.cos(), angle.sin()), prefix=3, mask=mask)  # fmt: skip
        for plan in PLANS:
            for dtype in (torch.bfloat16, torch.float16):
                q, k, v = randn(3, 1, 2, 330, 64, dtype=dtype)
                no_norms = (None, None, 0.0, None, None, 0)
                torch.ops.biflow.attention_forward(q, k, v, True, 0.125, None, *no_norms, plan)
                ops.attention(q[:, :, 199:], k, v, causal=True)
        decode(randn)
    torch.cuda.synchronize()
    print("done")


def decode(randn) -> None:
    """Blocks of ragged sizes, 19 guided samples after a prefix."""
    for options in ({}, dict(norm="rmsnorm", gate="swiglu", qk_norm=True, rope=True, start_token=True, flip=True)):
        config = ops.BlockConfig(tokens=5, channels=3, width=48, layers=2, head_dim=24, mlp_hidden=37, **options)
        weights = {name: 0.1 * randn(*shape) for name, shape in block_shapes(config).items()}
        z, prefix = randn(19, 5, 3), randn(19, 2, 48)
        for precision in ("fp32", "bf16"):
            packed = ops.pack_block(weights, config, precision)
            guided = dict(guidance=1.0, guide="ab", anneal=True, attn_temp=0.8)
            given = dict(packed.shape_options, **packed.affine_options, **guided)
            for plan in DECODES:
                torch.ops.biflow.decode_block_(
                    z, packed.packed, None, prefix, None, prefix, torch.empty_like(z), plan=plan, **given
                )


if __name__ == "__main__":
    main()
