"""Inpainting, class editing and interpolation."""

import pytest
import tiny
import torch
from tiny import make_flow, make_reverse

import biflow
from biflow import editing

LEFT = torch.tensor([[True, True, False, False]]).expand(4, 4)  # of the tiny models' images, the left tokens known
ALL, NONE = torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
MASKS = {"left": LEFT, "top": LEFT.T, "last token": torch.ones(4, 4).index_fill(0, torch.tensor([2, 3]), 0).bool()}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(batch, noisy):
    """Noise (B,1,4,4) and eps (B,4,4) as drawn from `seeded()`: all of an image before the next."""
    rows = torch.stack([torch.randn(32, generator=g) for g in [seeded()] for _ in range(batch)])
    return (rows[:, :16].view(-1, 1, 4, 4) if noisy else 0), rows[:, 16:].view(-1, 4, 4)


def labels(batch):
    return torch.arange(batch) % 3


@pytest.fixture(scope="module")
def flow():
    return make_flow(num_classes=3)


@pytest.fixture(scope="module")
def noisy_flow():
    return make_flow(num_classes=3, noise_std=0.2)


@pytest.fixture(scope="module")
def reverse():
    return make_reverse(num_classes=3)


def test_a_token_is_known_if_all_its_pixels_are():
    mask = ALL.clone()
    mask[0, 3] = mask[2, 0] = False
    assert editing.token_mask(mask[None, None], 2).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("name", sorted(tiny.VARIANTS))
def test_a_full_mask_gives_the_image_back(name):
    model = make_flow(**tiny.VARIANTS[name])
    x, (y, context) = tiny.images(model), tiny.make_condition(model, tiny.BATCH)
    found = editing.inpaint(model, x, ALL, y, context, rounds=1, keep_known=False)
    torch.testing.assert_close(found.images, x, rtol=0, atol=1e-4)
    assert float(found.max_error.max()) == float((found.images - x).abs().max()) < 1e-4
    assert found.known_tokens.all()


def test_noise_is_added_before_the_encode_and_comes_back(noisy_flow):
    x, y = tiny.images(noisy_flow), labels(4)
    options = {"denoise": False, "keep_known": False, "rounds": 1}
    found = editing.inpaint(noisy_flow, x, ALL, y, generator=seeded(), **options)
    noise, _ = draws(4, True)
    torch.testing.assert_close(found.images, x + 0.2 * noise, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.error, (0.2 * noise).flatten(1).square().mean(1).sqrt(), rtol=0, atol=1e-4)
    assert float(found.round_errors.max()) < 1e-4
    quiet = editing.inpaint(noisy_flow, x, ALL, y, noise_std=0, **options)
    torch.testing.assert_close(quiet.images, x, rtol=0, atol=1e-4)
    clean = editing.inpaint(noisy_flow, x, ALL, y, generator=seeded(), keep_known=False, rounds=1)
    torch.testing.assert_close(clean.images, noisy_flow.denoise(found.images, y), rtol=0, atol=1e-4)


def test_an_empty_mask_is_a_sample(flow):
    x, y = tiny.images(flow), labels(4)
    found = editing.inpaint(flow, x, NONE, y, generator=seeded(), rounds=3)
    _, eps = draws(4, False)
    assert torch.equal(found.z, eps)
    assert torch.equal(found.images, flow.decode(eps, y))
    torch.testing.assert_close(flow.encode(found.images, y)[0], eps, rtol=0, atol=1e-4)
    assert not found.error.any()
    assert not found.max_error.any()
    assert not found.round_errors.any()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_rounds_make_known_and_hidden_pixels_fit(noisy_flow, mask):
    """The fixed point: known pixels as given, hidden tokens with the z drawn, wherever the iteration began."""
    x, y = tiny.images(noisy_flow), labels(4)
    hidden = ~editing.token_mask(mask[None, None], 2)[0]
    results = []
    for fill in (0.0, x.flip(3)):
        found = editing.inpaint(
            noisy_flow, x, mask, y, rounds=25, fill=fill, denoise=False, keep_known=False, generator=seeded()
        )
        results.append(found.images)
        noise, eps = draws(4, True)
        assert float(found.round_errors[-1].max()) < 1e-4 < 1e-3 < float(found.round_errors[0].max())
        torch.testing.assert_close((x + 0.2 * noise)[..., mask], found.images[..., mask], rtol=0, atol=1e-3)
        torch.testing.assert_close(noisy_flow.encode(found.images, y)[0][:, hidden], eps[:, hidden], rtol=0, atol=1e-3)
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)


def test_one_round_is_the_formula(noisy_flow, reverse):
    """z' = M z + (1 - M) eps, decoded once, exactly or by the learned inverse."""
    x, y = tiny.images(noisy_flow), labels(4)
    noise, eps = draws(4, True)
    z, _ = noisy_flow.encode(torch.where(LEFT, x, 0.3) + 0.2 * noise, y)
    z = torch.where(editing.token_mask(LEFT[None, None], 2)[:, :, None], z, eps)
    noisy = make_reverse(num_classes=3, learned_denoising=False)
    for inverse, want in (
        (None, noisy_flow.denoise(noisy_flow.decode(z, y), y)),
        (reverse, reverse.decode(z, y, guidance=1.0)),
        (noisy, noisy_flow.denoise(noisy.decode(z, y, guidance=1.0), y)),
    ):
        options = {} if inverse is None else {"guidance": 1.0}
        found = editing.inpaint(
            noisy_flow, x, LEFT, y, inverse=inverse, rounds=1, fill=0.3, keep_known=False, generator=seeded(), **options
        )
        torch.testing.assert_close(found.images, want, rtol=0, atol=1e-4)
        difference = (found.images - x)[..., LEFT].flatten(1)
        torch.testing.assert_close(found.error, difference.square().mean(1).sqrt())
        torch.testing.assert_close(found.max_error, difference.abs().amax(1))


def test_rounds_of_a_learned_inverse_see_noise_again(noisy_flow, reverse):
    """What it returns is clean, and the flow encodes noisy images: the second round adds the first one's noise."""
    x, y = tiny.images(noisy_flow), labels(4)
    first = editing.inpaint(noisy_flow, x, LEFT, y, inverse=reverse, generator=seeded())
    second = editing.inpaint(noisy_flow, x, LEFT, y, inverse=reverse, rounds=2, generator=seeded())
    noise, eps = draws(4, True)
    z, _ = noisy_flow.encode(first.images + 0.2 * noise, y)
    want = torch.where(editing.token_mask(LEFT[None, None], 2)[:, :, None], z, eps)
    torch.testing.assert_close(second.z, want, rtol=0, atol=1e-5)
    assert not torch.equal(second.z, first.z)


@pytest.mark.parametrize("learned", [False, True], ids=["exact", "learned"])
def test_known_pixels_are_kept_and_hidden_ones_never_read(noisy_flow, reverse, learned):
    x, y = tiny.images(noisy_flow), labels(4)
    mask = torch.rand(4, 1, 4, 4, generator=seeded(1)) < 0.7
    mask[:, :, :2, :2] = True
    inverse, other = reverse if learned else None, torch.where(mask, x, torch.nan)
    found, same = (
        editing.inpaint(noisy_flow, v, mask, y, inverse=inverse, rounds=2, generator=seeded()) for v in (x, other)
    )
    assert torch.equal(found.images, same.images)
    assert torch.equal(torch.where(mask, found.images, 0.0), torch.where(mask, x, 0.0))
    assert ((found.images - x).abs() > 1e-3)[~mask].all()
    raw = editing.inpaint(
        noisy_flow, x, mask, y, inverse=inverse, rounds=2, keep_known=False, generator=seeded()
    ).images
    assert torch.equal(torch.where(mask, x, raw), found.images)
    assert not torch.equal(raw, found.images)


def test_a_learned_inverse_takes_one_pass(noisy_flow, reverse, monkeypatch):
    calls, decode = [], biflow.BiFlow.decode
    monkeypatch.setattr(biflow.BiFlow, "decode", lambda *a, **o: calls.append(o) or decode(*a, **o))
    monkeypatch.setattr(biflow.TarFlow, "decode", None)
    x, y = tiny.images(noisy_flow), labels(4)
    assert len(editing.inpaint(noisy_flow, x, LEFT, y, inverse=reverse).round_errors) == len(calls) == 1
    editing.edit_class(noisy_flow, x, 0, 1, inverse=reverse)
    editing.interpolate(noisy_flow, x, x, 3, y, inverse=reverse)
    assert len(calls) == 3


def test_an_inverse_or_a_flow_may_do_without_classes(noisy_flow, reverse):
    x, y = tiny.images(noisy_flow), labels(4)
    free = editing.inpaint(make_flow(), x, LEFT, y, inverse=reverse, generator=seeded()).images
    assert not torch.equal(free, editing.inpaint(make_flow(), x, LEFT, inverse=reverse, generator=seeded()).images)
    with pytest.raises(ValueError, match="y: expected None for a model without classes"):
        editing.inpaint(noisy_flow, x, LEFT, y, inverse=make_reverse())


def test_class_editing(noisy_flow, reverse):
    x, y = tiny.images(noisy_flow), labels(4)
    noise, _ = (torch.stack([torch.randn(16, generator=g) for g in [seeded()] for _ in range(4)]).view(x.shape), None)
    noisy = x + 0.2 * noise
    same = editing.edit_class(noisy_flow, x, y, y, denoise=False, generator=seeded())
    torch.testing.assert_close(same, noisy, rtol=0, atol=1e-4)
    target = torch.full((4,), 2)
    for to in (2, target):
        edited = editing.edit_class(noisy_flow, x, y, to, generator=seeded())
        want = noisy_flow.denoise(noisy_flow.decode(noisy_flow.encode(noisy, y)[0], target), target)
        torch.testing.assert_close(edited, want, rtol=0, atol=1e-4)
        learned = editing.edit_class(noisy_flow, x, y, to, inverse=reverse, generator=seeded())
        torch.testing.assert_close(learned, reverse.decode(noisy_flow.encode(noisy, y)[0], target), rtol=0, atol=1e-4)
    moved = (editing.edit_class(noisy_flow, x, y, 2, denoise=False, generator=seeded()) - noisy).abs().flatten(1)
    assert (moved.amax(1) > 1e-2).tolist() == (y != 2).tolist()
    free = editing.edit_class(noisy_flow, x, -1, -1, denoise=False, generator=seeded())
    torch.testing.assert_close(free, noisy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spherical", [True, False])
def test_interpolation_begins_and_ends_at_the_images(flow, spherical):
    x, y = tiny.images(flow, 6), labels(3)
    a, b = x[:3], x[3:]
    way = editing.interpolate(flow, a, b, 5, y, spherical=spherical)
    assert way.shape == (3, 5, 1, 4, 4)
    torch.testing.assert_close(way[:, [0, -1]], torch.stack([a, b], 1), rtol=0, atol=1e-4)
    z_a, z_b = flow.encode(a, y)[0], flow.encode(b, y)[0]
    middle = (z_a + z_b) / 2
    if spherical:  # sin(w/2) / sin(w) = 1 / (2 cos(w/2))
        cosine = (z_a * z_b).sum((1, 2)) / (z_a.flatten(1).norm(dim=1) * z_b.flatten(1).norm(dim=1))
        middle = middle / ((1 + cosine) / 2).sqrt()[:, None, None]
    torch.testing.assert_close(way[:, 2], flow.decode(middle, y), rtol=0, atol=1e-4)


def test_interpolation_with_noise_and_between_parallel_ends(noisy_flow, flow):
    x = tiny.images(flow)
    way = editing.interpolate(noisy_flow, x, x.flip(0), 2, denoise=False, generator=seeded())
    noise = torch.stack([torch.randn(32, generator=g) for g in [seeded()] for _ in range(4)]).view(4, 2, 1, 4, 4)
    torch.testing.assert_close(way, torch.stack([x, x.flip(0)], 1) + 0.2 * noise, rtol=0, atol=1e-4)
    still = editing.interpolate(flow, x, x, 3)
    torch.testing.assert_close(still, x[:, None].expand(-1, 3, -1, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True], ids=["exact", "learned"])
def test_results_are_those_of_the_batch_in_parts(noisy_flow, reverse, learned):
    x, y = tiny.images(noisy_flow, 6), labels(6)
    inverse = reverse if learned else None

    def edits(rows, g):
        v, k = x[rows], y[rows]
        yield editing.inpaint(noisy_flow, v, LEFT, k, inverse=inverse, rounds=3, generator=g[0]).images
        yield editing.edit_class(noisy_flow, v, k, 1, inverse=inverse, generator=g[1])
        yield editing.interpolate(noisy_flow, v, v.flip(1), 3, k, inverse=inverse, generator=g[2])

    def run(*parts):
        g = [seeded(k) for k in range(3)]
        found = [list(edits(rows, g)) for rows in parts]
        return [torch.cat(part) for part in zip(*found, strict=True)]

    whole, again, parts = run(slice(0, 6)), run(slice(0, 6)), run(slice(0, 1), slice(1, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    other = editing.inpaint(noisy_flow, x, LEFT, y, inverse=inverse, rounds=3, generator=seeded(9)).images
    assert not torch.equal(other, whole[0])


def test_decode_options_reach_the_decode(noisy_flow):
    x, y = tiny.images(noisy_flow), labels(4)

    def run(**options):
        return editing.inpaint(noisy_flow, x, LEFT, y, generator=seeded(), **options).images

    plain = run()
    torch.testing.assert_close(run(solver="windowed", window=2), plain, rtol=0, atol=1e-3)
    for options in ({"guidance": 2.0}, {"precision": "bf16"}, {"rounds": 1}, {"noise_std": 0.1}, {"denoise": False}):
        assert not torch.equal(run(**options), plain)
    torch.testing.assert_close(run(precision="bf16"), plain, rtol=0, atol=0.1)
    with torch.inference_mode():
        assert torch.equal(run(), plain)
    assert not plain.requires_grad


def test_an_image_that_overflows_leaves_the_others_alone(noisy_flow, monkeypatch):
    x, y, decode = tiny.images(noisy_flow), labels(4), biflow.TarFlow.decode

    def run():
        return editing.inpaint(noisy_flow, x, LEFT, y, rounds=2, generator=seeded())

    whole = run()

    def overflowing(self, z, *arguments, **options):
        out = decode(self, z, *arguments, **options)
        out[1, 0, 0, 3] = torch.inf
        return out

    monkeypatch.setattr(biflow.TarFlow, "decode", overflowing)
    found = run()
    others = [0, 2, 3]
    assert torch.equal(found.images[others], whole.images[others])
    assert not found.images[1].isfinite().all()
    assert torch.equal(found.images[1][:, LEFT], x[1][:, LEFT])


def test_no_images(noisy_flow):
    x, y = tiny.images(noisy_flow, 0), labels(0)
    assert editing.inpaint(noisy_flow, x, LEFT, y).images.shape == (0, 1, 4, 4)
    assert editing.edit_class(noisy_flow, x, 0, 1).shape == (0, 1, 4, 4)
    assert editing.interpolate(noisy_flow, x, x, 3, y).shape == (0, 3, 1, 4, 4)


def inpainting(**changes):
    def call(flow, reverse, x):
        arguments = {"flow": flow, "x": x, "mask": LEFT, **changes}
        if "inverse" in changes:
            arguments["inverse"] = reverse if changes["inverse"] is None else changes["inverse"]
        return editing.inpaint(**arguments)

    return call


BAD = {
    "float mask": (inpainting(mask=LEFT.float()), TypeError, "mask: expected a bool tensor"),
    "mask as a list": (inpainting(mask=[True]), TypeError, "mask: expected a bool tensor.*got list"),
    "mask of tokens": (inpainting(mask=ALL[:2, :2]), ValueError, r"mask: expected shape \(4, 4\).*got \(2, 2\)"),
    "mask of another batch": (inpainting(mask=ALL.expand(3, 1, 4, 4)), ValueError, r"mask: .*got \(3, 1, 4, 4\)"),
    "mask elsewhere": (inpainting(mask=LEFT.to("meta")), ValueError, "mask: expected a tensor on cpu"),
    "images of another size": (inpainting(x=torch.zeros(4, 1, 6, 6)), ValueError, r"x: expected shape .*6, 6"),
    "images of bytes": (inpainting(x=torch.zeros(4, 1, 4, 4, dtype=torch.uint8)), TypeError, "x: expected a floating"),
    "known NaN": (inpainting(x=torch.full((4, 1, 4, 4), torch.nan)), ValueError, "x: expected finite values"),
    "no rounds": (inpainting(rounds=0), ValueError, "rounds: expected at least 1, got 0"),
    "rounds not a number": (inpainting(rounds=1.5), TypeError, "rounds: expected an int"),
    "fill of another shape": (inpainting(fill=torch.zeros(3)), ValueError, "fill: expected a shape that broadcasts"),
    "fill that grows x": (inpainting(fill=torch.zeros(2, 4, 1, 4, 4)), ValueError, "fill: expected a shape that"),
    "infinite fill": (inpainting(fill=float("inf")), ValueError, "fill: expected a finite number"),
    "negative noise": (inpainting(noise_std=-1), ValueError, "noise_std: expected a finite number >= 0, got -1"),
    "generator": (inpainting(generator=7), TypeError, "generator: expected a torch.Generator or None"),
    "denoise not bool": (inpainting(denoise=1), TypeError, "denoise: expected True, False or None"),
    "denoise without noise": (inpainting(flow=make_flow(), denoise=True), ValueError, "denoise: expected a model with"),
    "denoise twice": (inpainting(inverse=None, denoise=True), ValueError, "denoise: expected None with an inverse"),
    "solver of an inverse": (inpainting(inverse=None, solver="jacobi"), ValueError, "solver: expected with the exact"),
    "context of an inverse": (inpainting(inverse=None, context=torch.zeros(4, 1, 5)), ValueError, "context: expected"),
    "another flow's inverse": (inpainting(inverse=make_reverse(num_blocks=2)), ValueError, "does not belong to this"),
    "inverse as flow": (inpainting(flow=make_reverse()), TypeError, "flow: expected a TarFlow, got BiFlow"),
    "flow as inverse": (inpainting(inverse=make_flow()), TypeError, "inverse: expected a BiFlow, got TarFlow"),
    "info": (inpainting(return_info=True), ValueError, "return_info: expected in decode"),
    "unknown solver": (inpainting(solver="magic"), ValueError, "solver: expected one of"),
    "label out of range": (inpainting(y=torch.full((4,), 3)), ValueError, r"y: expected labels in \[0, 3\)"),
    "source out of range": (lambda f, r, x: editing.edit_class(f, x, 3, 0), ValueError, "source: expected a class in"),
    "target not int": (lambda f, r, x: editing.edit_class(f, x, 0, 1.5), TypeError, "target: expected an int"),
    "target tensor": (
        lambda f, r, x: editing.edit_class(f, x, 0, torch.full((3,), 1)), ValueError, "target: y: expected shape",
    ),
    "flow without classes": (
        lambda f, r, x: editing.edit_class(make_flow(), x, 0, 0), ValueError, "expected a TarFlow with classes",
    ),
    "inverse without classes": (
        lambda f, r, x: editing.edit_class(f, x, 0, 0, inverse=make_reverse()), ValueError, "expected a BiFlow with cl",
    ),
    "one step": (lambda f, r, x: editing.interpolate(f, x, x, 1), ValueError, "steps: expected at least 2"),
    "ends that differ": (lambda f, r, x: editing.interpolate(f, x, x[:2], 3), ValueError, "x_b: expected shape"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message, noisy_flow, reverse):
    with pytest.raises(error, match=message):
        call(noisy_flow, reverse, tiny.images(noisy_flow))
