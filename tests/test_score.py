"""Scores of sets of images: the numerics against closed forms and scipy, sources and files, the command."""

import importlib
import json
import math
import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from biflow import cli, evaluate
from biflow.data import DataConfig, load
from biflow.data.adm import NpzImages, to_bytes, write_adm, write_floats
from biflow.evaluate import sets
from biflow.evaluate.moments import BLOCK


def draw(n, features, seed, scale=1.0):
    """Correlated normal rows, fp64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, dtype=torch.float64, generator=generator) / features**0.5
    return scale * torch.randn(n, features, dtype=torch.float64, generator=generator) @ mix + 0.1 * seed


# --- moments


@pytest.mark.parametrize("size", [1, 7, 500])
def test_streamed_moments_do_not_depend_on_batches(size):
    """To the bit, and they are numpy's, with a mean that is large beside the deviations."""
    rows = draw(2 * BLOCK + 200, 5, 1) + 1e4
    streams = [evaluate.StreamingMoments() for _ in range(2)]
    for stream, n in zip(streams, (size, 333), strict=True):
        for part in rows.split(n):
            stream.add(part)
    one, two = (stream.result() for stream in streams)
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.covariance, two.covariance)
    assert one.count == len(rows)
    np.testing.assert_allclose(one.mean, rows.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(one.covariance, np.cov(rows.numpy() - 1e4, rowvar=False), rtol=1e-9, atol=1e-9)


def test_result_can_be_asked_for_on_the_way():
    rows, stream = draw(BLOCK + 9, 3, 2), evaluate.StreamingMoments()
    stream.add(rows[:5])
    first = stream.result()
    assert torch.equal(first.covariance, evaluate.Moments.of(rows[:5]).covariance)
    stream.add(rows[5:])
    np.testing.assert_allclose(stream.result().covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-12)


def test_moments_of_ranks_merge_into_those_of_all():
    rows = draw(400, 6, 3)
    parts = [evaluate.Moments.of(part) for part in rows.split([1, 150, 249])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    want = evaluate.Moments.of(rows)
    assert merged.count == 400
    torch.testing.assert_close(merged.mean, want.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.covariance, want.covariance, rtol=1e-12, atol=1e-12)


def test_wrong_moments_are_refused():
    one = evaluate.Moments.of(draw(9, 3, 0))
    with pytest.raises(ValueError, match="expected 3 features to merge, got 2"):
        one.merge(evaluate.Moments.of(draw(9, 2, 0)))
    with pytest.raises(ValueError, match="expected two with a count to merge"):
        one.merge(evaluate.Moments(one.mean, one.covariance, None))
    with pytest.raises(ValueError, match=r"a covariance \(F,F\), got \(3,\) and \(2, 2\)"):
        evaluate.Moments(one.mean, torch.eye(2).double(), 4)
    with pytest.raises(ValueError, match="expected 3 features in both, got 2"):
        evaluate.gaussian_distance(one, evaluate.Moments.of(draw(9, 2, 0)))
    with pytest.raises(ValueError, match="expected at least one row"):
        evaluate.StreamingMoments().result()


# --- Frechet distance


def reference_distance(a, b):
    """Heusel et al. 2017, eq. 6, by the matrix root of scipy."""
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    shift = (a.mean - b.mean).numpy()
    return shift @ shift + np.trace(a.covariance + b.covariance) - 2 * np.trace(root).real


@pytest.mark.parametrize(
    ("n", "features"), [(500, 3), (300, 64), (40, 64)], ids=["few", "many", "singular: fewer rows than features"]
)
def test_distance_is_the_formula_with_scipys_root(n, features):
    a, b = evaluate.Moments.of(draw(n, features, 1)), evaluate.Moments.of(draw(n + 20, features, 2, scale=1.3))
    assert evaluate.gaussian_distance(a, b) == pytest.approx(reference_distance(a, b), rel=1e-6)
    assert evaluate.gaussian_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_distance_of_few_rows_is_the_one_of_their_gram_matrix():
    """tr (S_a S_b)^(1/2) is the sum of the singular values of X_a X_b^T, X centred rows: N x N, no covariance."""
    x, y = draw(30, 200, 1), draw(45, 200, 2)
    a, b = evaluate.Moments.of(x), evaluate.Moments.of(y)
    gram = (x - x.mean(0)) @ (y - y.mean(0)).T / math.sqrt(29 * 44)
    want = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    want = float(want - 2 * torch.linalg.svdvals(gram).sum())
    assert evaluate.gaussian_distance(a, b) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("rotated", [False, True], ids=["diagonal", "commuting"])
def test_distance_of_commuting_gaussians_is_that_of_their_deviations(rotated):
    """|mu|^2 + sum (sigma_a - sigma_b)^2, variances of 0 among them."""
    basis = torch.linalg.qr(draw(8, 8, 5)).Q if rotated else torch.eye(8, dtype=torch.float64)
    sigma_a, sigma_b = torch.tensor([3, 2, 1, 0.5, 0.1, 0, 0, 1e-3]), torch.tensor([1, 2, 0, 0.7, 3, 0, 2, 1e-3])
    sigmas = [sigma.double() for sigma in (sigma_a, sigma_b)]
    shift = torch.linspace(-1, 1, 8, dtype=torch.float64)
    means = (torch.zeros_like(shift), shift)
    a, b = (evaluate.Moments(m, (basis * s.square()) @ basis.T, None) for m, s in zip(means, sigmas, strict=True))
    want = shift.square().sum() + (sigmas[0] - sigmas[1]).square().sum()
    assert evaluate.gaussian_distance(a, b) == pytest.approx(float(want), rel=1e-9)


# --- Inception Score, precision and recall


def test_inception_score_of_known_distributions():
    sure = torch.full((4000, 10), -1e4)
    sure[torch.arange(4000), torch.arange(4000) % 10] = 0
    assert evaluate.inception_score(sure) == (pytest.approx(10), None)
    assert evaluate.inception_score(torch.zeros(50, 10)) == (pytest.approx(1), None)
    logits = torch.randn(7001, 6, generator=torch.Generator().manual_seed(0))
    p, scores = logits.double().softmax(1), []
    for part in (p[:5000], p[5000:]):
        scores.append(float((part * (part / part.mean(0)).log()).sum(1).mean().exp()))
    assert evaluate.inception_score(logits) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))


def test_precision_and_recall_in_tiles_are_the_naive_ones(monkeypatch):
    """Duplicates within and between the sets among them: distances of exactly 0, and balls of no size."""
    real, samples = draw(90, 12, 1).float() + 3, draw(70, 12, 2).float() + 2.9
    samples[:20], samples[30:36] = real[:20], samples[36]
    real[60:65] = samples[30]

    def naive(points, by):
        radius = (by[:, None] - by[None]).double().square().sum(-1).sort(1).values[:, 3]
        squares = (points[:, None] - by[None]).double().square().sum(-1)
        return float((squares <= radius).any(1).double().mean())

    want = naive(samples, real), naive(real, samples)
    assert min(want) > 0.2
    assert max(want) < 1
    for tile in (4096, 64, 7, 1):
        monkeypatch.setattr(importlib.import_module("biflow.evaluate.precision_recall"), "TILE", tile)
        assert evaluate.precision_recall(real, samples) == want


def test_one_point_repeated_covers_itself_alone():
    point = draw(1, 300, 1) * 1e3
    assert evaluate.precision_recall(point.repeat(9, 1), point.repeat(5, 1)) == (1, 1)
    assert evaluate.precision_recall(point.repeat(9, 1), (point * 1.001).repeat(5, 1)) == (0, 0)


def test_equal_rows_are_at_distance_0():
    """Whatever sums of products round to; rows as near as fp32 can tell apart are not."""
    rows = draw(99, 300, 1).float() + 100
    squares = importlib.import_module("biflow.evaluate.precision_recall")._squares
    found = squares(rows.double(), rows.double())
    assert (found.diagonal() == 0).all()
    near = rows.clone()
    near[:, 0] += 3
    other = squares(near.double(), rows.double()).diagonal()
    torch.testing.assert_close(other, (near - rows).double().square().sum(1), rtol=1e-6, atol=0)


# --- ADM's .npz


def test_adm_npz_opens_in_plain_numpy_and_is_data(tmp_path):
    pixels = torch.randint(0, 256, (11, 3, 4, 4), dtype=torch.uint8)
    x = (pixels + 0.5) / 128 - 1
    write_adm(tmp_path / "s.npz", x.split(4), 11, torch.arange(11) % 3)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        assert (file["arr_0"].dtype, file["arr_0"].shape) == (np.uint8, (11, 4, 4, 3))
        assert (file["arr_1"].dtype, file["arr_1"].tolist()) == (np.int64, [k % 3 for k in range(11)])
        np.testing.assert_array_equal(file["arr_0"], pixels.permute(0, 2, 3, 1))
    data = load(DataConfig(source=str(tmp_path / "s.npz"), val_fraction=0.0))
    assert torch.equal(data.train_x.batch(), x)
    assert data.train_y.tolist() == [k % 3 for k in range(11)]
    for size in (1, 7, 500):
        batches = list(NpzImages(tmp_path / "s.npz").batches(size))
        assert [len(batch) for batch in batches][:-1] == [size] * (len(batches) - 1)
        assert torch.equal(torch.cat(batches), pixels)
        share = list(NpzImages(tmp_path / "s.npz").batches(size, range(2, 10)))
        assert torch.equal(torch.cat(share), pixels[2:10])
        assert list(NpzImages(tmp_path / "s.npz").batches(size, range(11, 11))) == []


def test_pixels_go_to_the_bins_that_they_lie_in():
    x = torch.tensor([-3.0, -1.0, -0.0001, 0.0, 0.9999, 1.0, math.inf, -math.inf, math.nan]).view(1, 1, 1, -1)
    got = to_bytes(x)
    assert got.shape == (1, 3, 1, 9)
    assert got[0, 1, 0].tolist() == [0, 0, 127, 128, 255, 255, 255, 0, 128]
    assert torch.equal(to_bytes(got[:, :1]), got)
    with pytest.raises(ValueError, match=r"expected images \(N,1,H,W\) or \(N,3,H,W\), got shape \(1, 4, 2, 2\)"):
        to_bytes(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(("write", "size"), [(write_adm, 1), (write_floats, 4)])
def test_writing_holds_a_batch_and_leaves_no_file_of_fewer_images(tmp_path, write, size):
    def batches(count):
        for _ in range(count):
            yield torch.zeros(8, 3, 64, 64)

    tracemalloc.start()
    write(tmp_path / "s.npz", batches(100), 800)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "s.npz").stat().st_size > 800 * 3 * 64 * 64 * size > 10 * peak  # of what is not torch's
    with pytest.raises(ValueError, match="expected 17 images, got 16"):
        write(tmp_path / "short.npz", batches(2), 17)
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((3, 4, 4, 4), np.float32)}, r"images: expected images .* got float32 \(3, 4, 4, 4\)"),
        ({"arr_0": np.zeros((3, 4, 4), np.int64)}, r"arr_0: expected images .* got int64"),
        ({"arr_0": np.array([None, 1])}, "arr_0: expected images .* got object"),
        ({"x_train": np.asfortranarray(np.zeros((3, 4, 4), np.uint8))}, "expected arrays in C order"),
    ],
    ids=["latents", "integers", "objects", "fortran"],
)
def test_other_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"bad.npz: .*{message}"):
        NpzImages(tmp_path / "bad.npz")


def test_values_out_of_range_are_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", images=np.full((3, 4, 4), 1.5, np.float32))
    with pytest.raises(ValueError, match=r"expected values in \[-1, 1\], got values in \[1.5, 1.5\]"):
        next(NpzImages(tmp_path / "bad.npz").batches(2))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text.npz: expected a .npz with images"):
        NpzImages(tmp_path / "text.npz")


# --- sets of images and the command


def toy(images):
    """A network of few features, in the place of Inception."""
    x = images.double().mean((2, 3)) / 255
    pool = torch.cat([x, x.square(), torch.sin(9 * x[:, :1])], 1)
    return {"pool": pool.float(), "spatial": pool[:, :4].float(), "logits": 5 * pool.float()}


def toy_dinov2(images):
    return {"dinov2": images.float().flatten(1)[:, ::13] / 255}


@pytest.fixture
def networks(monkeypatch):
    monkeypatch.setattr(evaluate, "Inception", lambda weights, device: toy)
    monkeypatch.setattr(evaluate, "DINOv2", lambda weights, device: toy_dinov2)


def samples(path, count=60, seed=0):
    generator = np.random.default_rng(seed)
    tone = generator.integers(20, 200, (count, 1, 1, 3))
    np.savez(path, arr_0=(tone + generator.integers(0, 50, (count, 8, 8, 3))).astype(np.uint8), arr_1=np.full(count, 7))
    return path


def run(capsys, *arguments):
    assert cli.main(["score", *map(str, arguments), "--quiet"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_score_does_not_depend_on_the_batch(networks, tmp_path, capsys):
    own, other = samples(tmp_path / "own.npz"), samples(tmp_path / "other.npz", 80, seed=1)
    first, *more = [
        run(capsys, own, "--reference", other, "--dinov2", "cached", "--batch-size", n) for n in (1, 7, 500)
    ]
    assert more == [first, first]
    assert first["samples"] == {"source": str(own), "images": 60, "corrupt": 0}
    assert first["reference"]["images"] == {"pool": 80, "spatial": 80, "dinov2": 80}
    numbers = [first[name] for name in ("fid", "sfid", "fd_dinov2", "inception_score", "precision", "recall")]
    assert min(numbers) > 0
    features = [toy(next(NpzImages(path).batches(500)))["pool"] for path in (own, other)]
    assert first["fid"] == pytest.approx(evaluate.frechet_distance(*features), rel=1e-9)
    assert (first["precision"], first["recall"]) == evaluate.precision_recall(*features[::-1])


def test_statistics_stand_in_for_their_images(networks, tmp_path, capsys):
    own, other = samples(tmp_path / "own.npz"), samples(tmp_path / "other.npz", 80, seed=1)
    want = run(capsys, own, "--reference", other, "--dinov2", "cached")
    report = run(capsys, other, "--dinov2", "cached", "--save-statistics", tmp_path / "kept.npz")
    assert (report["fid"], report["inception_score"] > 1) == (None, True)
    got = run(capsys, own, "--reference", tmp_path / "kept.npz", "--dinov2", "cached")
    assert {**got, "reference": 0} == {**want, "reference": 0}
    assert got["reference"]["images"] == {"pool": 80, "spatial": 80, "dinov2": 80}


def test_adms_reference_gives_its_statistics_and_its_images(networks, tmp_path, capsys):
    """mu and sigma are of a data set that the images are but a part of."""
    own, part = samples(tmp_path / "own.npz"), samples(tmp_path / "part.npz", 30, seed=1)
    whole = toy(next(NpzImages(samples(tmp_path / "whole.npz", 80, seed=2)).batches(80)))
    arrays = dict(np.load(part))
    for name, (mean, covariance) in (("pool", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
        arrays |= {mean: whole[name].numpy().mean(0), covariance: np.cov(whole[name].numpy(), rowvar=False)}
    np.savez(tmp_path / "VIRTUAL.npz", **arrays)
    got = run(capsys, own, "--reference", tmp_path / "VIRTUAL.npz")
    features, images = (toy(next(NpzImages(path).batches(99)))["pool"] for path in (own, part))
    assert got["fid"] == pytest.approx(evaluate.frechet_distance(features, whole["pool"]), rel=1e-5)
    assert (got["precision"], got["recall"]) == evaluate.precision_recall(images, features)
    assert got["reference"]["images"] == {"pool": None, "spatial": None}
    assert got["reference"]["precision_recall_images"] == 30


def test_folders_are_scored_as_their_images(networks, tmp_path, capsys):
    arrays = np.load(samples(tmp_path / "own.npz"))["arr_0"]
    for k, array in enumerate(arrays):
        folder = tmp_path / "images" / f"class{k // 30}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{k:03}.png")
    other = samples(tmp_path / "other.npz", 80, seed=1)
    want = run(capsys, tmp_path / "own.npz", "--reference", other)
    got = run(capsys, tmp_path / "images", "img_size=8", "--reference", other, "--batch-size", 7)
    for name in ("fid", "sfid", "precision", "recall", "inception_score"):
        assert got[name] == pytest.approx(want[name], rel=1e-9)
    (tmp_path / "images" / "class0" / "000.png").write_bytes(b"broken")
    assert run(capsys, tmp_path / "images", "img_size=8", "--reference", other)["samples"]["corrupt"] == 1


def test_a_share_of_a_folder_is_that_of_all_and_reads_no_other_image(tmp_path):
    (tmp_path / "images").mkdir()
    for k, array in enumerate(np.load(samples(tmp_path / "own.npz"))["arr_0"][:20]):
        Image.fromarray(array).save(tmp_path / "images" / f"{k:03}.png")
    config = DataConfig(source=str(tmp_path / "images"), img_size=8)
    whole = torch.cat(list(evaluate.ImageSet.of(config).batches(7)))
    (tmp_path / "images" / "000.png").write_bytes(b"broken")
    found = []
    for rows in (range(10), range(10, 20)):
        images = evaluate.ImageSet.of(config)
        parts = torch.cat(list(images.batches(3, rows)))
        found.append(list(images.corrupt()))
        same = (parts == whole[rows.start : rows.stop]).flatten(1).all(1)
        assert same.sum() == 10 - len(found[-1])
    assert sorted(found) == [[], ["000.png"]]


def test_statistics_of_ranks_merge(tmp_path):
    images = next(NpzImages(samples(tmp_path / "own.npz")).batches(99))
    whole = evaluate.measure([images], [toy])
    one, two = (evaluate.measure([part], [toy]) for part in images.split([22, 38]))
    merged = one.merge(two)
    assert torch.equal(merged.pool, whole.pool)
    assert torch.equal(merged.logits, whole.logits)
    covariances = (statistics.moments["pool"].covariance for statistics in (merged, whole))
    torch.testing.assert_close(*covariances, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="expected features pool, spatial in both, got dinov2"):
        evaluate.SetStatistics(one.moments).merge(evaluate.measure([images], [toy_dinov2]))


def test_a_large_reference_keeps_features_of_a_part(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "REFERENCE_IMAGES", 20)
    images = evaluate.ImageSet.of(DataConfig(source=str(samples(tmp_path / "own.npz"))))
    whole = evaluate.measure_set(images, [toy], batch_size=7)
    part = evaluate.measure_reference(images, [toy], batch_size=7)
    assert torch.equal(part.pool, whole.pool[::3])
    assert torch.equal(part.moments["pool"].covariance, whole.moments["pool"].covariance)
    whole.save(tmp_path / "kept.npz")
    assert torch.equal(evaluate.read_statistics(tmp_path / "kept.npz").pool, part.pool)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{own} --reference none.npz", "none.npz: no such file"),
        ("{own} --reference {empty}", "empty.npz: expected images or statistics (mu and sigma), got neither"),
        ("{empty}", "empty.npz: expected images, got a file of statistics"),
        ("{own} --inception none", "--inception, --dinov2: expected at least one network"),
        ("{own} --inception none --dinov2 cached", "--reference: expected a reference, or --save-statistics"),
        ("{own} --save-statistics a.json", "--save-statistics: expected a file ending in .npz, got 'a.json'"),
        ("{own} --reference {own} --out no/such.json", "--out: expected an existing folder, got no"),
        ("{own} img_size=8 --reference {own}", "KEY=VALUE: expected only with a folder, shards or a"),
        ("{folder} imgsize=8 --reference {own}", "unknown field 'imgsize'"),
        ("{folder} --reference {own}", "expected img_size with encoded images"),
    ],
)
def test_what_cannot_be_scored(networks, tmp_path, capsys, line, message):
    own = samples(tmp_path / "own.npz")
    np.savez(tmp_path / "empty.npz", other=np.zeros(2))
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "folder" / "a.png")
    words = line.format(own=own, empty=tmp_path / "empty.npz", folder=tmp_path / "folder").split()
    assert cli.main(["score", *words, "--quiet"]) == 2
    assert message in capsys.readouterr().err


def test_sample_writes_what_score_reads(networks, tmp_path, capsys):
    from tiny import make_flow

    from biflow import checkpoint

    checkpoint.save(make_flow(num_classes=3), tmp_path / "flow.safetensors")
    line = ["sample", str(tmp_path / "flow.safetensors"), "--n", "10", "--batch", "4", "--seed", "3", "--out"]
    assert cli.main([*line, str(tmp_path / "adm.npz"), "--format", "adm"]) == 0
    assert cli.main([*line, str(tmp_path / "float.npz")]) == 0
    adm, plain = np.load(tmp_path / "adm.npz"), np.load(tmp_path / "float.npz")
    want = to_bytes(torch.from_numpy(plain["images"]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(adm["arr_0"], want)
    assert adm["arr_1"].tolist() == plain["labels"].tolist()
    capsys.readouterr()
    one, two = (run(capsys, tmp_path / name, "--reference", tmp_path / "adm.npz") for name in ("adm.npz", "float.npz"))
    assert {**one, "samples": 0} == {**two, "samples": 0}
    assert (one["precision"], one["fid"]) == (1, pytest.approx(0, abs=1e-9))
    assert cli.main([*line, str(tmp_path / "s.png"), "--format", "adm"]) == 2
    assert "--format: expected adm only with --out FILE.npz" in capsys.readouterr().err
    checkpoint.save(make_flow(in_channels=4), tmp_path / "flow.safetensors")
    assert cli.main([*line, str(tmp_path / "latents.npz"), "--format", "adm"]) == 2
    assert "expected images (N,1,H,W) or (N,3,H,W), got shape" in capsys.readouterr().err
    assert not (tmp_path / "latents.npz").exists()
