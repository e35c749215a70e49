"""ml-tarflow's format: round trips, agreement with the formulas, refusal of everything else."""

import pickle

import pytest
import safetensors.torch
import torch
from oracle_tarflow import Oracle, make_state_dict
from tiny import make_flow

from biflow import interop
from biflow.models.layers import patchify, unpatchify

# img_size, patch_size, in_channels, width, head_dim, blocks, layers, classes, nvp
SHAPES = {
    "plain": (4, 2, 1, 16, 8, 2, 1, 0, True),
    "classes": (6, 2, 3, 16, 8, 3, 2, 4, True),
    "one-pixel-patches": (4, 1, 2, 16, 16, 4, 1, 3, True),
    "no-scale": (4, 2, 1, 16, 8, 3, 2, 3, False),
    "no-scale-no-classes": (6, 3, 1, 24, 8, 2, 1, 0, False),
    "head-dim-64": (4, 2, 1, 64, 64, 2, 1, 2, True),
}


def build(name):
    img, patch, cin, width, head_dim, blocks, layers, classes, nvp = SHAPES[name]
    tokens, channels = (img // patch) ** 2, cin * patch**2
    g = torch.Generator().manual_seed(1)
    var = 0.5 + torch.rand(tokens, channels, generator=g)  # not ones, with a scale or without
    std = 0.3 / width**0.5  # tame: rounding must not be amplified until it looks like a wrong formula
    state = make_state_dict(tokens, channels, width, blocks, layers, classes, nvp, var, std)
    flow = interop.from_ml_tarflow(state, img_size=img, patch_size=patch, in_channels=cin, head_dim=head_dim)
    x = torch.rand(4, cin, img, img, generator=g) * 2 - 1
    y = torch.tensor([0, classes - 1, 1, 0]) if classes else None
    return state, flow, Oracle(state, head_dim), x, y


@pytest.mark.parametrize("name", SHAPES)
def test_state_dict_round_trips(name):
    state, flow, *_ = build(name)
    back = interop.to_ml_tarflow(flow)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    back["blocks.0.pos_embed"].zero_()
    assert flow.blocks[0].pos_embed.abs().max() > 0, "the export shares memory with the model"


@pytest.mark.parametrize("name", SHAPES)
def test_encode_and_logdet_follow_the_formulas(name):
    state, flow, oracle, x, y = build(name)
    for labels in [None] if y is None else [None, y, torch.tensor([-1, 1, -1, 0])]:
        want_z, want_logdet = oracle.encode(oracle.tokens(x, flow.config.patch_size), labels)
        z, logdet = flow.encode(x, labels)
        torch.testing.assert_close(logdet.double(), _our_logdet(want_logdet, state).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(z, want_z / state["var"].sqrt(), rtol=1e-5, atol=1e-5)
        z, logdet = interop.to_ml_tarflow_outputs(flow, z, logdet)
        torch.testing.assert_close(z, want_z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logdet, want_logdet, rtol=1e-5, atol=1e-5)


def _our_logdet(mean, state):
    return mean * state["var"].numel() - 0.5 * state["var"].log().sum()


@pytest.mark.parametrize(
    ("guidance", "guide", "anneal", "attn_temp"),
    [(0.0, "ab", True, 1.0), (1.0, "ab", False, 1.0), (1.5, "ab", True, 1.0), (1.0, "a", False, 1.0),
     (1.0, "b", True, 0.7), (0.8, "ab", False, 1.6)],
)  # fmt: skip
@pytest.mark.parametrize("name", SHAPES)
def test_decode_follows_the_formulas(name, guidance, guide, anneal, attn_temp):
    _, flow, oracle, _, y = build(name)
    z = torch.randn(4, flow.config.tokens, flow.config.channels, generator=torch.Generator().manual_seed(2))
    x = flow.decode(z, y, guidance=guidance, guide=guide, anneal=anneal, attn_temp=attn_temp)
    want = oracle.decode(z, y, guidance, guide, anneal, attn_temp)
    torch.testing.assert_close(patchify(x, flow.config.patch_size), want, rtol=1e-5, atol=1e-5)


def test_guidance_moves_the_oracle():
    """Otherwise the test above would compare unguided decodes."""
    _, flow, oracle, _, y = build("classes")
    z = torch.randn(4, flow.config.tokens, flow.config.channels, generator=torch.Generator().manual_seed(2))
    options = [(0.0, "ab", True, 1.0), (1.0, "ab", True, 1.0), (1.0, "ab", False, 1.0), (1.0, "a", True, 1.0),
               (1.0, "ab", True, 0.7)]  # fmt: skip
    outputs = [oracle.decode(z, y, *o) for o in options]
    for i, a in enumerate(outputs):
        assert all((a - b).abs().max() > 1e-3 for b in outputs[:i])


def test_patch_order_is_that_of_unfold():
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(patchify(x, 2), torch.nn.functional.unfold(x, 2, stride=2).mT)
    assert torch.equal(unpatchify(patchify(x, 3), 3), x)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_reads_files(tmp_path, suffix):
    state, flow, *_ = build("classes")
    path = tmp_path / f"model{suffix}"
    torch.save(state, path) if suffix == ".pth" else safetensors.torch.save_file(state, path)
    loaded = interop.from_ml_tarflow(path, img_size=6, patch_size=2, in_channels=3, head_dim=8, noise_std=0.1)
    assert loaded.config.noise_std == 0.1
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), flow.state_dict().values(), strict=True))


def test_loading_leaves_the_random_stream_alone():
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    build("plain")
    assert torch.equal(torch.rand(1), want)


def _edit(**changes):
    """A state_dict of the "plain" shape with entries replaced (None: removed)."""
    state = build("plain")[0]
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


BAD_STATES = {
    "missing": (lambda: _edit(**{"blocks.1.proj_out.bias": None}), r"blocks\.1\.proj_out\.bias: missing"),
    "no-blocks": (lambda: {"var": torch.ones(4, 4)}, r"blocks\.0\.proj_in\.weight: missing"),
    "no-layers": (
        lambda: {k: v for k, v in build("plain")[0].items() if "attn_blocks" not in k},
        r"attn_blocks\.0\.attention\.norm\.weight: missing",
    ),
    "no-var": (lambda: _edit(var=None), "var: missing"),
    "unexpected": (lambda: _edit(**{"blocks.0.extra": torch.ones(1)}), r"blocks\.0\.extra: unexpected"),
    "gap": (
        lambda: {k.replace("blocks.1.", "blocks.2."): v for k, v in build("plain")[0].items()},
        r"blocks\.2\..*unexpected",
    ),
    "shape": (
        lambda: _edit(**{"blocks.1.attn_blocks.0.attention.qkv.weight": torch.ones(47, 16)}),
        r"blocks\.1\.attn_blocks\.0\.attention\.qkv\.weight: expected shape \(48, 16\), got \(47, 16\)",
    ),
    "dims": (lambda: _edit(**{"blocks.0.proj_in.weight": torch.ones(4)}), r"blocks\.0\.proj_in\.weight: expected 2"),
    "empty": (lambda: _edit(**{"blocks.0.proj_in.weight": torch.ones(0, 4)}), r"blocks\.0\.proj_in\.weight: .*empty"),
    "dtype": (lambda: _edit(var=torch.ones(4, 4, dtype=torch.float64)), r"var: expected torch\.float32, got .*float64"),
    "int-dtype": (
        lambda: _edit(**{"blocks.0.pos_embed": torch.ones(4, 16, dtype=torch.int64)}),
        r"blocks\.0\.pos_embed: expected torch\.float32",
    ),
    "mask": (lambda: _edit(**{"blocks.1.attn_mask": torch.ones(4, 4)}), r"blocks\.1\.attn_mask: .*lower triangle"),
    "var-sign": (lambda: _edit(var=-torch.ones(4, 4)), "var: expected positive finite"),
    "var-zero": (lambda: _edit(var=torch.zeros(4, 4)), "var: expected positive finite"),
    "var-inf": (lambda: _edit(var=torch.full((4, 4), torch.inf)), "var: expected positive finite"),
    "mixed-nvp": (
        lambda: _edit(**{"blocks.1.proj_out.weight": torch.ones(4, 16), "blocks.1.proj_out.bias": torch.ones(4)}),
        r"blocks\.1\.proj_out\.weight: expected shape \(8, 16\), got \(4, 16\)",
    ),
    "not-a-tensor": (lambda: _edit(step=3), "expected names and tensors, got 'step': int"),
    "not-a-mapping": (lambda: [1, 2], "state_dict: expected a mapping"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_refuses_a_wrong_state_dict(name):
    make, message = BAD_STATES[name]
    with pytest.raises(ValueError, match=message):
        interop.from_ml_tarflow(make(), img_size=4, patch_size=2, in_channels=1, head_dim=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 6}, r"var: expected shape \(9, 4\), got \(4, 4\)"),
        ({"in_channels": 3}, r"blocks\.0\.proj_in\.weight: expected 12 columns"),
        ({"head_dim": 64}, "multiple of head_dim 64, got 16"),
        ({"patch_size": 0}, "patch_size: expected at least 1, got 0"),
    ],
)
def test_refuses_wrong_arguments(arguments, message):
    options = {"img_size": 4, "patch_size": 2, "in_channels": 1, "head_dim": 8, **arguments}
    with pytest.raises(ValueError, match=message):
        interop.from_ml_tarflow(build("plain")[0], **options)


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


def test_refuses_bad_files(tmp_path, capsys):
    def read(path):
        return interop.from_ml_tarflow(path, img_size=4, patch_size=2, in_channels=1, head_dim=8)

    good = tmp_path / "good.pth"
    torch.save(build("plain")[0], good)
    read(good)
    (tmp_path / "short.pth").write_bytes(good.read_bytes()[:1000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    torch.save({"var": Payload()}, tmp_path / "evil_zip.pth")
    (tmp_path / "short.safetensors").write_bytes(safetensors.torch.save(build("plain")[0])[:500])
    (tmp_path / "weights.bin").write_bytes(b"")
    for path in sorted(tmp_path.iterdir()):
        if path != good:
            with pytest.raises(ValueError, match=path.name):
                read(path)
    with pytest.raises(ValueError, match="refused"):
        read(tmp_path / "evil_zip.pth")
    assert capsys.readouterr().out == "", "a pickle was executed"
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"clip": ("hard", 1.0)}, "clip: "),
        ({"rope": True}, "rope: "),
        ({"start_token": True}, "start_token: "),
        ({"scale": "softplus"}, "scale: .*'exp' only, got 'softplus'"),
        ({"norm": "rmsnorm"}, "norm: "),
        ({"gate": "swiglu"}, "gate: "),
        ({"qk_norm": True}, "qk_norm: "),
        ({"pos_embed": False}, "pos_embed: "),
        ({"num_classes": 2, "class_tokens": 1}, "class_tokens: "),
        ({"context_dim": 3}, "context_dim: "),
        ({"mlp_ratio": 2.0}, "mlp_ratio: "),
        ({"layers_per_block": (1, 2, 1)}, "layers_per_block: "),
        ({"dtype": torch.float64}, "expected torch.float32, got torch.float64"),
    ],
)
def test_export_refuses_what_the_format_cannot_say(config, message):
    with pytest.raises(ValueError, match=message):
        interop.to_ml_tarflow(make_flow(**config))


def test_export_refuses_other_objects():
    with pytest.raises(ValueError, match="flow: expected a TarFlow, got dict"):
        interop.to_ml_tarflow({})


def test_non_finite_weights_are_carried():
    state = build("plain")[0]
    state["blocks.0.pos_embed"][0, 0] = torch.nan
    flow = interop.from_ml_tarflow(state, img_size=4, patch_size=2, in_channels=1, head_dim=8)
    assert flow.blocks[0].pos_embed[0, 0].isnan()
