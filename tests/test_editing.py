"""Inpainting, class editing and interpolation, and their commands."""

import re

import numpy as np
import pytest
import tiny
import tiny_training
import torch
from tiny import make_flow, make_reverse

import biflow
from biflow import cli, editing, evaluate

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


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """flow, inverse (8x8, two classes) and images.npz, which neither was trained on, in a folder."""
    folder = tmp_path_factory.mktemp("editing")
    tiny_training.write_images(folder / "images.npz")
    rng = np.random.RandomState(1)
    shape, labels = (40, 8, 8), np.arange(40) % 2
    x = {name: rng.randint(0, 256, shape).astype(np.uint8) for name in ("x_train", "x_test")}
    for name in x:
        x[name][labels == 0, :, 4:] = 255
    np.savez(folder / "split.npz", **x, y_train=labels, y_test=labels)
    torch.manual_seed(0)
    biflow.save(tiny_training.random_flow(tiny_training.flow_config("none").model), folder / "flow.safetensors")
    inverse = biflow.BiFlow(tiny_training.inverse_config("none").model)
    biflow.save(tiny.randomize(inverse, 0.1), folder / "inverse.safetensors")
    return folder


def run(files, line, out=None, source="images.npz"):
    words = [word.format(files=files) for word in line.split()]
    words[1:1] = [f"{files}/flow.safetensors", "--images", f"{files}/{source}"]
    return cli.main(words + (["--out", str(out)] if out else []))


@pytest.mark.parametrize("inverse", ["", " --inverse {files}/inverse.safetensors"], ids=["exact", "learned"])
def test_inpaint_writes_what_the_function_returns(files, tmp_path, capsys, monkeypatch, inverse):
    monkeypatch.setattr(cli.editing, "BATCH", 3)
    out = tmp_path / "i.npz"
    assert run(files, f"inpaint --half right --n 7 --seed 4{inverse}", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"known pixels as decoded: root mean square error( [\d.e-]+)+", lines[0])
    assert re.fullmatch(r"known pixels of the clean result: [\d.e-]+, largest [\d.e-]+", lines[1])
    assert lines[2:] == [f"{out}: 7 images"]
    got = np.load(out)
    data = biflow.data.load(biflow.data.DataConfig(source=f"{files}/images.npz", val_fraction=0.0))
    rows = torch.arange(7) * 60 // 7
    mask = torch.arange(8).expand(8, 8) < 4
    model = biflow.load(files / "inverse.safetensors") if inverse else None
    x, y = data.train_x.batch(rows), data.train_y[rows]
    want = editing.inpaint(biflow.load(files / "flow.safetensors"), x, mask, y, inverse=model, generator=seeded(4))
    np.testing.assert_allclose(got["images"][..., 0], want.images[:, 0].clamp(-1, 1), atol=1e-5)
    assert got["labels"].tolist() == y.tolist()
    assert len(lines[0].split("error ")[1].split()) == (1 if inverse else 4)


def test_masks_of_the_command_line(files, tmp_path):
    from PIL import Image

    pixels = np.full((8, 8), 255, np.uint8)
    pixels[1:4, 2:7] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    drawn = cli.editing._mask(8, str(tmp_path / "mask.png"), None, None)
    assert torch.equal(drawn, torch.from_numpy(pixels == 255))
    assert torch.equal(cli.editing._mask(8, None, None, "1,2,3,5"), drawn)
    shown = {half: cli.editing._mask(5, None, half, None) for half in ("left", "right", "top", "bottom")}
    assert shown["left"].tolist() == [[False] * 2 + [True] * 3] * 5
    assert torch.equal(shown["right"], ~shown["left"])
    assert torch.equal(shown["top"], shown["left"].T)
    assert torch.equal(shown["bottom"], ~shown["top"])


def test_edit_and_interpolate_write_what_the_functions_return(files, tmp_path):
    flow = biflow.load(files / "flow.safetensors")
    data = biflow.data.load(biflow.data.DataConfig(source=f"{files}/images.npz", val_fraction=0.0))
    assert run(files, "edit --from 1 --to 0 --n 5 --no-denoise", tmp_path / "e.npz") == 0
    got = np.load(tmp_path / "e.npz")
    rows = (data.train_y == 1).nonzero()[:, 0][torch.arange(5) * 30 // 5]
    want = editing.edit_class(flow, data.train_x.batch(rows), 1, 0, denoise=False, generator=seeded())
    np.testing.assert_allclose(got["images"][..., 0], want[:, 0].clamp(-1, 1), atol=1e-5)
    assert got["labels"].tolist() == [0] * 5
    assert run(files, "interpolate --n 2 --steps 3 --linear --class 1", tmp_path / "w.npz") == 0
    got = np.load(tmp_path / "w.npz")
    rows = (data.train_y == 1).nonzero()[:, 0][torch.arange(4) * 30 // 4]
    x, y = data.train_x.batch(rows), torch.ones(2, dtype=torch.int64)
    want = editing.interpolate(flow, x[:2], x[2:], 3, y, spherical=False, generator=seeded())
    np.testing.assert_allclose(got["images"][..., 0], want.flatten(0, 1)[:, 0].clamp(-1, 1), atol=1e-5)
    assert got["labels"].tolist() == [1] * 6


@pytest.mark.parametrize("line", ["inpaint --half top", "edit --from 0 --to 1", "interpolate --n 2 --steps 4"])
def test_pictures(files, tmp_path, line):
    from PIL import Image

    out = tmp_path / "p.png"
    assert run(files, line, out) == 0
    image = np.asarray(Image.open(out))
    assert min(image.shape[:2]) > 100
    assert image.std() > 1


def test_inpaint_tells_the_class_agreement(files, tmp_path, capsys, monkeypatch):
    import functools

    monkeypatch.setattr(evaluate, "EvaluationConfig", functools.partial(evaluate.EvaluationConfig, judge_steps=30))
    line = "inpaint --half left --n 20 --agreement --inverse {files}/inverse.safetensors"
    assert run(files, line, tmp_path / "i.npz", "split.npz") == 0
    (found,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("class agreement")]
    shares = re.fullmatch(
        r"class agreement: ([\d.]+); the same images whole ([\d.]+), hidden part gray ([\d.]+)", found
    ).groups()
    assert float(shares[1]) > 0.9  # the classes differ on the right, which stays
    assert run(files, "inpaint --half left --agreement", tmp_path / "i.npz") == 2
    assert "expected held-out images" in capsys.readouterr().err


BAD_LINES = {
    "no mask": ("inpaint", "expected one of --mask, --half and --box, got none"),
    "two masks": ("inpaint --half left --box 0,0,1,1", "one of --mask, --half and --box, got --half and --box"),
    "half of what": ("inpaint --half middle", "--half: expected one of left, right, top, bottom, got 'middle'"),
    "box of three": ("inpaint --box 1,2,3", "--box: expected four integers TOP,LEFT,HEIGHT,WIDTH, got '1,2,3'"),
    "box outside": ("inpaint --box 4,4,5,1", "--box: expected a rectangle inside images of 8x8 pixels"),
    "no mask file": ("inpaint --mask {files}/none.png", "none.png: no such file"),
    "mask not an image": ("inpaint --mask {files}/images.npz", "images.npz: expected an image that Pillow can decode"),
    "class": ("inpaint --half left --class 2", "--class: expected a class in [0, 2), own or none, got '2'"),
    "solver": (
        "inpaint --half left --solver jacobi --inverse {files}/inverse.safetensors", "--solver: expected without --inv",
    ),
    "no-denoise": (
        "edit --from 0 --to 1 --no-denoise --inverse {files}/inverse.safetensors", "--no-denoise: expected with",
    ),
    "flow as inverse": ("inpaint --half left --inverse {files}/flow.safetensors", "expected a BiFlow, got a TarFlow"),
    "guidance": (
        "inpaint --half left --guidance 9 --inverse {files}/inverse.safetensors", "guidance: expected at most 2",
    ),
    "from": ("edit --from 2 --to 1", "--from: expected a class in [0, 2), got 2"),
    "to": ("edit --from 0 --to 5", "--to: expected a class in [0, 2), got 5"),
    "own": ("interpolate --class own", "--class: expected a class or none, got 'own'"),
    "pairs": ("interpolate --n 40", "--n: expected at most 30 pairs of the 60 images, got 40"),
    "data of another size": ("inpaint --half left --images digits.npz", "digits.npz: no such file"),
    "output": ("inpaint --half left --out x.gif", "expected a file ending in .png or .npz"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines(files, line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(files, line) == 2
    err = capsys.readouterr().err
    assert err.startswith("biflow: error: ")
    assert err.count("\n") == 1
    assert message in err
