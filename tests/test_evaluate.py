"""Evaluation against closed forms, the eager baseline against the fused decode, and metrics that must move."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from tiny import BATCH, VARIANTS, make_condition, make_flow, make_reverse, noise

import biflow
from biflow import evaluate
from biflow.data import DataConfig, load
from biflow.evaluate import EvaluationConfig, RealData, metrics, plots, timing
from biflow.evaluate.bits import bounds
from biflow.evaluate.classifier import Classifier
from biflow.models.layers import patchify

TINY = {"img_size": 8, "in_channels": 1, "patch_size": 2, "width": 16, "head_dim": 8, "num_blocks": 2}
QUICK = EvaluationConfig(samples=60, guidances=(0.0, 1.0), noise_draws=1, judge_steps=40, held_out_images=60)


def tiny_flow(**options):
    return make_flow(**{**TINY, "layers_per_block": 2, **options})


def tiny_pair():
    rev = make_reverse(**TINY, num_classes=10, class_tokens=2, max_guidance=3.0)
    return rev, tiny_flow(num_classes=10, noise_std=0.1)


@pytest.fixture(scope="module")
def real():
    return RealData.of(load(DataConfig()), QUICK)


# --- Frechet distance -----------------------------------------------------------------------------------------------


def whitened(n, features, seed):
    """Samples whose sample mean is 0 and sample covariance the identity, up to rounding."""
    x = torch.randn(n, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    sigma_a, sigma_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.5]).double()
    shift = torch.tensor([1.0, -2.0, 0.25]).double()
    a, b = whitened(50, 3, 0) * sigma_a, whitened(70, 3, 1) * sigma_b + shift
    want = shift.square().sum() + (sigma_a - sigma_b).square().sum()
    assert evaluate.frechet_distance(a, b) == pytest.approx(float(want), rel=1e-9)


def test_frechet_of_gaussians_that_do_not_commute():
    """N = 2: tr (S_a S_b)^(1/2) = sqrt(tr(S_a S_b) + 2 sqrt(det S_a det S_b)), from the eigenvalues of a 2x2 matrix."""
    root_a = torch.tensor([[2.0, 0.0], [1.0, 0.5]]).double()
    root_b = torch.tensor([[0.7, 0.0], [-0.9, 1.2]]).double()
    a, b = whitened(40, 2, 2) @ root_a.T, whitened(40, 2, 3) @ root_b.T
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    root = math.sqrt((cov_a @ cov_b).trace() + 2 * math.sqrt(torch.det(cov_a) * torch.det(cov_b)))
    want = float(cov_a.trace() + cov_b.trace()) - 2 * root
    assert evaluate.frechet_distance(a.float(), b.float()) == pytest.approx(want, rel=1e-5)
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.randn(3, 3), torch.randn(9, 3), ValueError, "at least 4 samples for 3 features, got 3"),
        (torch.randn(9, 3), torch.randn(9, 4), ValueError, "expected 3 features as in a, got 4"),
        (torch.randn(9, 3, 1), torch.randn(9, 3), ValueError, r"expected features \(N, F\), got shape \(9, 3, 1\)"),
        (torch.randn(9, 3), torch.full((9, 3), math.nan), ValueError, "b: expected finite"),
        (torch.ones(9, 3, dtype=torch.int64), torch.randn(9, 3), TypeError, "floating-point tensor, got torch.int64"),
    ],
)
def test_frechet_refuses(a, b, error, message):
    with pytest.raises(error, match=message):
        evaluate.frechet_distance(a, b)


# --- precision and recall -------------------------------------------------------------------------------------------


def test_precision_and_recall_of_points_on_a_line():
    """By hand, k = 1: real points 0, 1, 3 reach 1, 1, 2; samples 0.5, 4.9, 9, 9.5 reach 4.4, 4.1, 0.5, 0.5."""
    real = torch.tensor([[0.0], [1.0], [3.0]])
    samples = torch.tensor([[0.5], [4.9], [9.0], [9.5]])
    precision, recall = evaluate.precision_recall(real, samples, k=1)
    assert precision == 2 / 4  # 0.5 and 4.9
    assert recall == 1.0
    assert evaluate.precision_recall(samples, real, k=1) == (recall, precision)


def test_precision_and_recall_tell_one_mode_from_noise():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(1200, 4, generator=generator)  # more than are held at once
    again = torch.randn(1200, 4, generator=generator)
    precision, recall = evaluate.precision_recall(real, again)
    assert precision > 0.8
    assert recall > 0.8
    precision, recall = evaluate.precision_recall(real, 0.2 * again)  # collapsed
    assert precision > 0.9
    assert recall < 0.1
    precision, recall = evaluate.precision_recall(real, 5 * again)  # scattered
    assert precision < 0.2
    assert recall > 0.8


@pytest.mark.parametrize(
    ("real", "samples", "k", "error", "message"),
    [
        (torch.ones(9, 2, dtype=torch.int64), torch.ones(9, 2), 3, TypeError, "real: expected a floating-point"),
        (torch.ones(9, 2), torch.ones(9), 3, ValueError, r"samples: expected features \(N, F\)"),
        (torch.ones(9, 2), torch.ones(9, 3), 3, ValueError, "samples: expected 2 features as in real, got 3"),
        (torch.ones(9, 2), torch.ones(3, 2), 3, ValueError, "samples: expected more than k = 3 rows, got 3"),
        (torch.ones(9, 2), torch.ones(9, 2), 0, ValueError, "k: expected an int of at least 1, got 0"),
        (torch.full((9, 2), math.nan), torch.ones(9, 2), 3, ValueError, "real: expected finite features"),
    ],
)
def test_bad_features_for_precision_and_recall(real, samples, k, error, message):
    with pytest.raises(error, match=message):
        evaluate.precision_recall(real, samples, k=k)


# --- the eager baseline ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_eager_decode_equals_the_op(name):
    flow = make_flow(**VARIANTS[name])
    z, (y, context) = noise(flow), make_condition(flow, BATCH)
    strengths = [{}, {"guidance": 0.8, "guide": "b", "anneal": False}, {"guidance": 1.5, "attn_temp": 0.7}]
    for strength in strengths:
        want = flow.decode(z, y, context, **strength)
        got = evaluate.eager_decode(flow, z, y, context, **strength)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    # the comparison would see a guidance that does nothing
    assert (flow.decode(z, y, context) - want).abs().max() > 1e-4


# --- classifier and metrics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 8, 17, 28, 64])
def test_the_classifier_takes_images_of_every_size(size):
    """From 18 pixels on the number of channels has reached its limit."""
    model, images = Classifier(1, size, 10).eval(), torch.zeros(2, 1, size, size)
    assert model.features(images).shape == (2, 32)
    assert model(images).shape == (2, 10)


def test_classifier_knows_held_out_digits_and_is_deterministic():
    data = load(DataConfig())
    state = torch.random.get_rng_state()
    splits = (data.train_x.batch(), data.train_y, data.val_x.batch(), data.val_y, 10)
    judge = evaluate.train_judge(*splits)
    assert judge.held_out_accuracy >= 0.97
    assert torch.equal(state, torch.random.get_rng_state())
    one, two = (evaluate.train_judge(*splits, steps=5).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_samples_go_to_the_model_and_come_back():
    """Nothing is computed on "meta": what arrives there was moved."""
    model, z, y = torch.nn.Linear(1, 1, device="meta"), torch.randn(5, 2), torch.arange(5)
    seen = []

    def decode(z, y):
        seen.append((z.device.type, None if y is None else y.device.type, len(z)))
        return torch.ones(len(z), 3)

    for labels, kind in ((y, "meta"), (None, None)):
        got = metrics._batched(decode, model, z, labels, 2)
        assert (got.shape, got.device.type) == ((5, 3), "cpu")
        assert seen == [("meta", kind, n) for n in (2, 2, 1)]
        seen.clear()


def test_real_images_pass_for_real_and_noise_does_not(real):
    truth = evaluate.describe_samples(real.val_x, real.val_y, real, 0.0)
    rubbish = evaluate.describe_samples(torch.randn_like(real.val_x), real.val_y, real, 0.0)
    assert truth["class_agreement"] == real.judge.held_out_accuracy > rubbish["class_agreement"] + 0.4
    assert truth["frechet"] < 0.5 * rubbish["frechet"]
    assert truth["precision"] > max(0.5, rubbish["precision"])
    assert truth["recall"] > max(0.5, rubbish["recall"])
    assert abs(truth["unclamped_std_difference"]) < 0.1 < rubbish["unclamped_std_difference"]


def test_metrics_of_a_flow(real):
    flow = tiny_flow(num_classes=10, noise_std=0.1)
    report = evaluate.evaluate_flow(flow, real, QUICK)
    x = real.val_x
    # the bits of one noise draw differ from those of another by little; of clean images as well
    near = float(flow.bits_per_dim(x, real.val_y, bin_width=real.bin_width).detach().mean())
    assert report["held_out_bits_per_dim"] == pytest.approx(near, abs=0.05)
    assert 0 < report["round_trip_max_error"] < 1e-4
    assert 0 < report["sample_residual_max"] < 1e-3
    assert [s["guidance"] for s in report["samples"]] == [0.0, 1.0]
    assert evaluate.evaluate_flow(flow, real, QUICK) == report
    turned = evaluate.evaluate_flow(flow, real, dataclasses.replace(QUICK, guidances=(1.0, 0.0)))
    assert turned["sample_residual_max"] == report["sample_residual_max"], "not at the largest guidance"


def test_metrics_of_an_inverse(real):
    rev, flow = tiny_pair()
    report = evaluate.evaluate_inverse(rev, flow, real, QUICK)
    z, y = evaluate.noise(rev, QUICK)
    difference = rev.decode(z, y, guidance=1.0) - flow.denoise(flow.decode(z, y, guidance=1.0), y)
    assert report["samples"][1]["distance_to_exact"] == pytest.approx(
        float(difference.square().mean().sqrt()), rel=1e-4
    )
    assert report["reconstruction_mse"] > 0
    assert math.isfinite(report["samples"][0]["frechet"])


def test_guidance_above_what_was_trained_is_left_out(real):
    rev, flow = tiny_pair()
    config = dataclasses.replace(QUICK, guidances=(0.0, 3.0, 4.0))
    assert [s["guidance"] for s in evaluate.evaluate_inverse(rev, flow, real, config)["samples"]] == [0.0, 3.0]


def test_pairs_and_data_that_do_not_fit_are_refused(real):
    rev, _ = tiny_pair()
    with pytest.raises(ValueError, match="expected num_classes 3, got 10"):
        evaluate.evaluate_inverse(rev, tiny_flow(num_classes=3), real, QUICK)
    with pytest.raises(ValueError, match="expected img_size 16 as the model has, got 8"):
        evaluate.check_data(tiny_flow(img_size=16), load(DataConfig()))


# --- bounds on the bits per dim


def test_importance_weighted_bound_is_below_the_average_image_by_image():
    log_p = 5 * torch.randn(8, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for n in range(30):
        one = bounds(log_p[:, n : n + 1], 12, 0.25)
        assert one["_importance_weighted"] < one[""]
        assert one["_standard_error"] is None
    both = bounds(log_p, 12, 0.25)
    bits = -log_p.mean(0) / (12 * math.log(2)) + 2
    assert both[""] == pytest.approx(float(bits.mean()))
    assert both["_standard_error"] == pytest.approx(float(bits.std()) / 30**0.5)
    single = bounds(log_p[:1], 12, 0.25)
    assert single["_importance_weighted"] == pytest.approx(single[""], rel=1e-12)
    assert bounds(log_p, 12, None)[""] is None
    with pytest.raises(ValueError, match=r"expected a matrix \(K,N\) with values, got shape \(8,\)"):
        bounds(log_p[:, 0], 12, 0.25)


def test_bounds_of_a_standard_normal_are_the_closed_forms(tmp_path):
    """A fresh flow is the identity: -log2 of the mass of a bin, and the mean of a parabola over it."""
    images = np.random.default_rng(0).choice([-0.5, 0.5], (40, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images)
    real = RealData.of(load(DataConfig(source=str(tmp_path / "images.npz"), val_fraction=0.9)), QUICK)
    real = dataclasses.replace(real, bin_width=1.0)
    flow = biflow.TarFlow(biflow.TarFlowConfig(**{**TINY, "img_size": 4, "layers_per_block": 1}))
    draws = 300
    report = evaluate.evaluate_flow(flow, real, dataclasses.replace(QUICK, samples=10, noise_draws=draws))
    x, w = real.val_x.double(), 1.0
    normal = torch.distributions.Normal(0.0, 1.0)
    exact = -(normal.cdf(x + w / 2) - normal.cdf(x - w / 2)).log2().mean()
    uniform = ((x**2 + w**2 / 12) / 2 + 0.5 * math.log(2 * math.pi)).mean() / math.log(2) - math.log2(w)
    # -log2 p varies by about |x| w / sqrt(12) / ln 2 with the noise of each value
    tolerance = 4 * 0.21 / (draws * x.numel()) ** 0.5
    assert report["held_out_bits_per_dim"] == pytest.approx(float(uniform), abs=tolerance)
    assert report["held_out_bits_per_dim_importance_weighted"] == pytest.approx(float(exact), abs=2 * tolerance)
    assert uniform - exact > 5 * tolerance, "no test of the difference"


# --- pictures and timings


@pytest.mark.parametrize("noise_std", [0.0, 0.1])
@pytest.mark.parametrize("shift_only", [False, True])
def test_trajectories_end_in_what_the_models_decode(shift_only, noise_std):
    flow = make_flow(num_classes=3, shift_only=shift_only, noise_std=noise_std)
    rev = make_reverse(num_classes=3, max_guidance=2.0)
    z, (y, _) = noise(flow), make_condition(flow, BATCH)
    exact, learned = plots.trajectories(flow, rev, z, y, 1.0)
    assert len(exact) == flow.config.num_blocks + 2
    torch.testing.assert_close(learned[-1], rev.decode(z, y, guidance=1.0))
    want = flow.decode(z, y, guidance=1.0)
    torch.testing.assert_close(exact[-2], want)
    torch.testing.assert_close(exact[-1], flow.denoise(want, y) if noise_std else want)
    exact, _ = plots.trajectories(flow, rev, z, y, 0.0)
    states = flow.encode(flow.decode(z, y), y, return_states=True)[2]
    for image, state in zip(exact[1:-1], states[-2::-1], strict=True):
        torch.testing.assert_close(patchify(image, 2), state, rtol=1e-4, atol=1e-4)


def test_timing_has_every_way_and_counts_the_score_step():
    rev, flow = tiny_pair()
    report = evaluate.time_decoders(rev, flow, guidance=1.0, batches=(1, 4), repetitions=2)
    for row, size in zip(report["batches"], (1, 4), strict=True):
        assert row["batch_size"] == size
        assert row["learned"] > 0
        assert row["exact_op"] > row["exact_op_decode"] > 0
        assert row["exact_eager"] > row["exact_eager_decode"] > 0


def test_timing_waits_for_the_device(monkeypatch):
    """Whatever the device, each time is a difference of looks at its clock."""
    given, ticks = [], itertools.count()

    def clock(device):
        given.append(device)
        return lambda: float(next(ticks))

    monkeypatch.setattr(timing, "device_clock", clock)
    rev, flow = tiny_pair()
    (row,) = evaluate.time_decoders(rev, flow, guidance=1.0, batches=(4,), repetitions=1)["batches"]
    assert given == [torch.device("cpu")]
    assert [row[k] for k in ("learned", "exact_op", "exact_op_decode")] == [500.0, 500.0, 250.0]


def test_samples_that_overflowed_are_counted_not_hidden(real):
    images = real.val_x.clone()
    images[:5] = math.nan
    entry = evaluate.describe_samples(images, real.val_y, real, 0.0)
    right = (real.judge.predict(real.val_x[5:]) == real.val_y[5:]).sum() / len(images)
    assert entry["non_finite"] == 5
    assert entry["class_agreement"] == pytest.approx(float(right))
    assert math.isfinite(entry["frechet"])
    nothing = evaluate.describe_samples(torch.full_like(images, math.inf), real.val_y, real, 0.0)
    assert (nothing["non_finite"], nothing["frechet"], nothing["pixel_std"]) == (60, None, None)


def test_data_without_labels_or_bins_has_no_numbers_that_need_them(tmp_path):
    np.savez(tmp_path / "plain.npz", images=np.linspace(-1, 1, 60 * 64, dtype=np.float32).reshape(60, 8, 8))
    real = RealData.of(load(DataConfig(source=str(tmp_path / "plain.npz"))), QUICK)
    rev = make_reverse(**TINY)
    flow = tiny_flow(noise_std=0.1)
    report = evaluate.evaluate_flow(flow, real, QUICK)
    assert report["held_out_bits_per_dim"] is None
    assert math.isfinite(report["held_out_nats_per_dim"])
    for entry in (*report["samples"], *evaluate.evaluate_inverse(rev, flow, real, QUICK)["samples"]):
        assert (entry["guidance"], entry["class_agreement"], entry["frechet"]) == (0.0, None, None)
        assert math.isfinite(entry["pixel_std_difference"])


def test_an_inverse_with_classes_fits_a_flow_without(real):
    rev, _ = tiny_pair()
    report = evaluate.evaluate_inverse(rev, tiny_flow(noise_std=0.1), real, QUICK)
    assert [s["guidance"] for s in report["samples"]] == [0.0, 1.0]
    assert all(math.isfinite(s["distance_to_exact"]) for s in report["samples"])


def test_heap_is_trimmed_after_each_batch(monkeypatch):
    trims = []
    monkeypatch.setattr(metrics, "_trim_heap", lambda: trims.append(1))
    flow = tiny_flow()
    config = EvaluationConfig(samples=7, batch_size=3)
    assert len(metrics.decode_exact(flow, *metrics.noise(flow, config), 0.0, config)) == 7
    assert len(trims) == 3
