"""Every GPU op on a few tokens: what compute-sanitizer gets, under which the tests would take hours."""

import torch

from biflow import ops


def main() -> None:
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=g, device="cuda").to(dtype)

    for shape, options in (((2, 70, 12), {"flip": True}), ((2, 5, 7), {"layout": "interleaved", "causal": False})):
        for dtype in (torch.float32, torch.bfloat16):
            x = randn(*shape, dtype=dtype).requires_grad_()
            params = randn(*shape[:2], 2 * shape[2], dtype=dtype).requires_grad_()
            mask = torch.rand(shape[:2], generator=g, device="cuda") > 0.3
            z, logdet = ops.affine_encode(x, params, mask=mask, **options)
            torch.autograd.grad(z.sum() + logdet.sum(), (x, params))
            ops.affine_decode(z.detach(), params.detach(), mask=mask, **options)
    with torch.no_grad():
        for heads, tokens, d, causal in ((2, 83, 64, True), (1, 200, 32, False), (1, 70, 128, False)):
            qkv = randn(2, tokens, 3 * heads * d, dtype=torch.bfloat16)
            angle = randn(tokens - 3, d // 2)
            weight = randn(d)
            mask = torch.rand((2, tokens), generator=g, device="cuda") > 0.3
            ops.attention_qkv(qkv, heads=heads, causal=causal, q_norm=weight, k_norm=weight,
                              rope=(angle.cos(), angle.sin()), prefix=3, mask=mask)  # fmt: skip
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
