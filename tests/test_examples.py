"""The examples against the same modules in plain torch, written from the formulas (not through biflow.reference)."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("tarflow_block", "starflow_block", "realnvp_images")


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(module, encode, plain, x):
    """Values, gradients to the input and to every weight, in fp64."""
    module.double()
    x = x.double()
    results = []
    for f in (encode, plain):
        leaf = x.clone().requires_grad_()
        z, logdet = f(leaf)
        loss = (z * torch.cos(z.detach())).sum() - logdet.sum()
        grads = torch.autograd.grad(loss, (leaf, *module.parameters()))
        results.append((z, logdet, *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_main_runs(name, capsys):
    load(name).main()
    assert "round trip max error" in capsys.readouterr().out


@pytest.mark.parametrize("flip", [False, True])
def test_tarflow_block(flip):
    torch.manual_seed(0)
    block = load("tarflow_block").TarFlowBlock(tokens=6, channels=3, width=16, layers=2, heads=2, flip=flip)
    x = torch.randn(4, 6, 3)

    def plain(x):
        log_scale, shift = block.params(x).chunk(2, dim=-1)
        if flip:
            log_scale, shift = (F.pad(t[:, 1:], (0, 0, 0, 1)) for t in (log_scale, shift))
        else:
            log_scale, shift = (F.pad(t[:, :-1], (0, 0, 1, 0)) for t in (log_scale, shift))
        return (x - shift) * torch.exp(-log_scale), -log_scale.sum(dim=(1, 2))

    assert_same(block, block.encode, plain, x)
    x = x.double()
    z = block.encode(x)[0]
    assert torch.equal(z[:, -1 if flip else 0], x[:, -1 if flip else 0])
    torch.testing.assert_close(block.decode(z), x, rtol=1e-9, atol=1e-9)


def test_starflow_block():
    torch.manual_seed(0)
    block = load("starflow_block").StarFlowBlock(channels=3, width=16, layers=2, heads=2)
    block.proj_out.weight.data *= 8  # logits in the curved part of the clip
    x = torch.randn(4, 6, 3)

    def layer(m, h):
        B, T, C = h.shape
        q, k, v = m.qkv(m.norm1(h)).chunk(3, dim=-1)
        q, k, v = (t.reshape(B, T, m.heads, C // m.heads).transpose(1, 2) for t in (q, k, v))
        logits = q @ k.transpose(2, 3) / math.sqrt(C // m.heads)
        logits = logits + torch.full((T, T), -math.inf).triu(1)
        h = h + m.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, C))
        n = m.norm2(h)
        return h + m.down(F.gelu(m.gate(n), approximate="tanh") * m.up(n))

    def plain(x):
        h = block.proj_in(torch.cat((block.start.expand(len(x), -1, -1), x[:, :-1]), dim=1))
        for m in block.layers:
            h = layer(m, h)
        raw, shift = (4 * torch.tanh(t / 4) for t in block.proj_out(h).chunk(2, dim=-1))
        sigma = F.softplus(raw + math.log(math.e - 1))
        return (x - shift) / sigma, -sigma.log().sum(dim=(1, 2))

    assert_same(block, block.encode, plain, x)
    x = x.double()
    torch.testing.assert_close(block.decode(block.encode(x)[0]), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("swap", [False, True])
def test_checkerboard_coupling(swap):
    torch.manual_seed(0)
    coupling = load("realnvp_images").CheckerboardCoupling(channels=3, width=8, swap=swap)
    image = torch.randn(2, 3, 4, 6)
    moved = torch.tensor([[(i + j) % 2 == (0 if swap else 1) for j in range(6)] for i in range(4)])

    def plain(image):
        kept = image * ~moved
        log_scale, shift = coupling.net(kept).chunk(2, dim=1)
        log_scale = 2 * torch.tanh(log_scale / 2) * moved
        return kept + moved * (image - shift) * torch.exp(-log_scale), -log_scale.sum(dim=(1, 2, 3))

    assert_same(coupling, coupling.encode, plain, image)
    image = image.double()
    torch.testing.assert_close(coupling.decode(coupling.encode(image)[0]), image, rtol=1e-9, atol=1e-9)


def test_channel_coupling():
    torch.manual_seed(0)
    coupling = load("realnvp_images").ChannelCoupling(channels=6, width=8)
    image = torch.randn(2, 6, 4, 5)

    def plain(image):
        kept, moved = image[:, :3], image[:, 3:]
        raw, shift = coupling.net(kept).chunk(2, dim=1)
        sigma = torch.sigmoid(raw + 2) + 1e-3
        return torch.cat((kept, (moved - shift) / sigma), dim=1), -sigma.log().sum(dim=(1, 2, 3))

    assert_same(coupling, coupling.encode, plain, image)
    image = image.double()
    torch.testing.assert_close(coupling.decode(coupling.encode(image)[0]), image, rtol=1e-9, atol=1e-9)
