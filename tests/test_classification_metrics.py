"""Accuracy and calibration of class scores, against numbers made by hand or by construction."""

import math

import pytest
import torch

from biflow import evaluate


def logits_of(confidences, classes=2):
    """log of (c, (1 - c) / (K - 1), ...), one row a confidence."""
    rows = [[c, *[(1 - c) / (classes - 1)] * (classes - 1)] for c in confidences]
    return torch.tensor(rows, dtype=torch.float64).log()


def test_calibration_error_by_hand():
    """Two bins of four: 0.6, 0.7 (one right) and 0.9, 0.95 (both right)."""
    logits, y = logits_of([0.6, 0.7, 0.9, 0.95]), torch.tensor([0, 1, 0, 0])
    want = 0.5 * abs(0.5 - 0.65) + 0.5 * abs(1 - 0.925)
    assert evaluate.calibration_error(logits, y, bins=4) == pytest.approx(want)
    assert evaluate.calibration_error(logits, y, bins=1) == pytest.approx(abs(0.75 - 0.7875))
    # a bin has its upper edge: 0.75 belongs to (0.5, 0.75]
    edge = logits_of([0.75, 0.6])
    assert evaluate.calibration_error(edge, torch.tensor([0, 1]), bins=4) == pytest.approx(abs(0.5 - 0.675))
    certain = torch.tensor([[50.0, 0.0]])
    assert evaluate.calibration_error(certain, torch.tensor([0])) == pytest.approx(0, abs=1e-12)
    assert evaluate.calibration_error(certain, torch.tensor([1])) == pytest.approx(1)


def test_negative_log_likelihood():
    logits = logits_of([0.8, 0.4]) + 3.0
    assert evaluate.negative_log_likelihood(logits, torch.tensor([0, 1])) == pytest.approx(
        -(math.log(0.8) + math.log(0.6)) / 2
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 8.0])
def test_the_temperature_that_labels_were_drawn_with(temperature):
    g = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(4000, 5, generator=g, dtype=torch.float64)
    y = torch.multinomial(true.softmax(1), 1, generator=g)[:, 0]
    logits = temperature * true
    fitted = evaluate.fit_temperature(logits, y)
    assert fitted == pytest.approx(temperature, rel=0.1)
    best = evaluate.negative_log_likelihood(logits / fitted, y)
    for other in (0.97, 1.03):
        assert evaluate.negative_log_likelihood(logits / (other * fitted), y) > best
    assert evaluate.calibration_error(logits / fitted, y) < 0.03
    if temperature != 1:
        assert evaluate.calibration_error(logits, y) > 0.1


def test_temperatures_stay_in_their_range():
    right, wrong = torch.tensor([0, 0]), torch.tensor([1, 1])
    logits = logits_of([0.7, 0.8])
    assert evaluate.fit_temperature(logits, right) == pytest.approx(1e-4)
    assert evaluate.fit_temperature(logits, wrong) == pytest.approx(1e6)


def test_log_posteriors_of_both_rules():
    scores = torch.tensor([[0.1, -0.2, 0.1]])
    torch.testing.assert_close(evaluate.log_posterior(scores, "gradient"), (3 * scores.double()).log_softmax(1))
    torch.testing.assert_close(evaluate.log_posterior(scores - 1e3, "bayes"), (scores - 1e3).double().log_softmax(1))


def test_a_description():
    """Temperatures come from the other half: labels of one half do not move its own."""
    g = torch.Generator().manual_seed(0)
    scores, y = torch.randn(60, 4, generator=g), torch.randint(4, (60,), generator=g)
    found = evaluate.describe_classification(scores, y, "bayes", top_k=2)
    assert found["count"] == 60
    assert found["accuracy"] == pytest.approx(float((scores.argmax(1) == y).double().mean()))
    assert found["accuracy"] < found["top_2_accuracy"] < 1
    assert found["nll_uniform"] == math.log(4)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    temperatures = [evaluate.fit_temperature(scores[half], y[half]) for half in (even, odd)]
    assert found["temperature"] == pytest.approx(temperatures)
    tempered = scores.double().clone()
    tempered[even] /= temperatures[1]
    tempered[odd] /= temperatures[0]
    assert found["tempered_nll"] == pytest.approx(evaluate.negative_log_likelihood(tempered, y))
    assert found["tempered_ece"] == pytest.approx(evaluate.calibration_error(tempered, y))
    assert "top_4_accuracy" in evaluate.describe_classification(scores, y, "gradient", top_k=9)


BAD = {
    "rule": (lambda s, y: evaluate.log_posterior(s, "odds"), ValueError, "rule: expected one of gradient, bayes"),
    "shape": (lambda s, y: evaluate.fit_temperature(s[0], y), ValueError, "scores: expected shape (N,K)"),
    "ints": (lambda s, y: evaluate.fit_temperature(s.long(), y), TypeError, "scores: expected a floating-point tensor"),
    "nan": (lambda s, y: evaluate.fit_temperature(s * torch.nan, y), ValueError, "scores: expected finite values"),
    "labels": (lambda s, y: evaluate.calibration_error(s, y + 3), ValueError, "expected labels in [0, 3), got values"),
    "count": (lambda s, y: evaluate.calibration_error(s, y[:1]), ValueError, "y: expected shape (2,), got (1,)"),
    "dtype": (lambda s, y: evaluate.calibration_error(s, y.float()), TypeError, "y: expected an int64 tensor"),
    "bins": (lambda s, y: evaluate.calibration_error(s, y, bins=0), ValueError, "bins: expected at least 1, got 0"),
    "one": (
        lambda s, y: evaluate.describe_classification(s[:1], y[:1], "bayes"), ValueError, "at least 2 labels",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, message):
    with pytest.raises(error) as raised:
        call(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert message in str(raised.value)
