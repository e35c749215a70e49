"""What a flow of an ablation knows of classes, at the end and along its training: classification, probes, curves."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from biflow import checkpoint, evaluate
from biflow.ablation.curves import measure_curve
from biflow.ablation.encoder import Prepared, held_out_alignment
from biflow.ablation.pieces import kept
from biflow.config import check_fields, to_mapping
from biflow.data import ImageData, spread
from biflow.evaluate import EvaluationConfig, ProbeConfig, RealData
from biflow.models import TarFlow
from biflow.train import likelihood_loss
from biflow.train.likelihood import add_noise


@dataclass(frozen=True)
class SemanticsConfig:
    """What is measured of a row's flow beside its samples. The data has to have labels, and held-out images.

    classify_images: held-out images that are classified by the gradient rule.
    bayes_images: of these so many, evenly spaced, are also classified by Bayes' rule; 0: none.
    noise_draws: of the training noise; at the end both rules are measured without and with so many draws, along the
        curve with them. 0, or a flow trained without noise: without alone.
    probe: of the linear probes of every layer.
    table_features: (block, layer) pairs, from 0, whose probes the table shows; (): all.
    curve_samples: of every checkpoint that the run has kept at a multiple of run.checkpoint_every (run.keep), also the
        Frechet distance of so many samples, classification and likelihood; 0: of none.
    curve_guidance: of these samples.
    """

    classify_images: int = 2000
    bayes_images: int = 500
    noise_draws: int = 4
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    table_features: tuple[tuple[int, int], ...] = ()
    curve_samples: int = 0
    curve_guidance: float = 0.0

    def __post_init__(self):
        check_fields(self)
        limits = {"classify_images": 2, "bayes_images": 0, "noise_draws": 0, "curve_samples": 0, "curve_guidance": 0}
        for name, least in limits.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.bayes_images == 1:
            raise ValueError("bayes_images: expected 0 or at least 2, got 1")


class Semantics:
    """What is measured of one row's flow.

    flow: trained, in `run` by `prepared.config`. data: of the run. real: of the same data, with a classifier.

    ValueError: data without labels or held-out images, a flow without classes.
    """

    def __init__(
        self,
        flow: TarFlow,
        run: Path,
        prepared: Prepared,
        data: ImageData,
        real: RealData,
        evaluation: EvaluationConfig,
        config: SemanticsConfig,
    ):
        if data.val_y is None or real.judge is None or not flow.config.num_classes:
            raise ValueError("semantics: expected labelled held-out images and a flow with classes, got none")
        self.flow, self.run, self.prepared, self.data = flow, run, prepared, data
        self.real, self.evaluation, self.config = real, evaluation, config
        self.rows = spread(len(data.val_x), config.classify_images)
        self.x, self.y = data.val_x.batch(self.rows), data.val_y[self.rows]
        self.draws = config.noise_draws if flow.config.noise_std > 0 else 0
        self.weights = checkpoint.fingerprint(flow)

    def curve(self) -> list[dict]:
        """`measure_curve`, each point with classification (gradient rule, `noise_draws`) and noisy_nats_per_dim."""
        if not self.config.curve_samples:
            return []

        def known(model: TarFlow) -> dict:
            return {"classification": self._gradient(model, self.draws), "noisy_nats_per_dim": self._nats(model)}

        return measure_curve(
            self.run,
            self.prepared.config,
            self.real,
            replace(self.evaluation, samples=self.config.curve_samples),
            self.config.curve_guidance,
            self._settings("classify_images", "noise_draws"),
            known,
            self.flow.var.device,
        )

    def measure(self, curve: list[dict]) -> dict:
        """For a row's result.

        classification: `describe_classification` of the gradient rule; noisy_classification: with `noise_draws`.
        bayes, noisy_bayes: the same of Bayes' rule on bayes_images, and agreement: how often the rules agree there.
        probe: `probe_flow` of all layers. noisy_nats_per_dim: mean of -log p(x | y) / (T D) of held-out images with the
        noise of training. alignment: `held_out_alignment`. curve: of each point of `self.curve()` step, frechet,
        class_agreement, accuracy, nll, ece and noisy_nats_per_dim.
        """
        last = self._last(curve)
        found = {"classification": self._kept("classification", ("classify_images",), self._gradient, self.flow, 0)}
        if self.draws:
            found["noisy_classification"] = last["classification"] if last else self._gradient(self.flow, self.draws)
        if self.config.bayes_images:
            names = ("classify_images", "bayes_images")
            found["bayes"] = self._kept("bayes", names, self._bayes, 0)
            if self.draws:
                found["noisy_bayes"] = self._kept("noisy_bayes", (*names, "noise_draws"), self._bayes, self.draws)
        found["probe"] = self._kept(
            "probe", ("probe",), lambda: evaluate.probe_flow(self.flow, self.data, config=self.config.probe)
        )
        found["noisy_nats_per_dim"] = last["noisy_nats_per_dim"] if last else self._nats(self.flow)
        seed, size = self.evaluation.seed, self.evaluation.batch_size
        found["alignment"] = held_out_alignment(self.flow, self.run, self.prepared, self.data, self.rows, seed, size)
        points = [
            {
                "step": point["step"],
                **{name: point["samples"][name] for name in ("frechet", "class_agreement")},
                **{name: point["classification"][name] for name in ("accuracy", "nll", "ece")},
                "noisy_nats_per_dim": point["noisy_nats_per_dim"],
            }
            for point in curve
        ]
        return {**found, "curve": points, "settings": to_mapping(self.config)}

    def samples(self, curve: list[dict]) -> dict[float, dict]:
        """Guidance -> what the curve's last point says of the final flow's samples, where it has as many as asked."""
        last, same = self._last(curve), self.config.curve_samples == self.evaluation.samples
        return {self.config.curve_guidance: last["samples"]} if last and same else {}

    def _last(self, curve: list[dict]) -> dict | None:
        """The point of the final flow; None: the curve has none."""
        return curve[-1] if curve and curve[-1]["step"] == self.prepared.config.optim.steps else None

    def _scores(self, flow: TarFlow, x: Tensor, rule: str, draws: int) -> Tensor:
        options = {"rule": rule, "noise_draws": draws, "batch_size": self.evaluation.batch_size}
        generator = torch.Generator().manual_seed(self.evaluation.seed)
        return flow.classify(x.to(flow.var.device), generator=generator, **options).cpu()

    def _gradient(self, flow: TarFlow, draws: int) -> dict:
        scores = self._scores(flow, self.x, "gradient", draws)
        return {"noise_draws": draws, **evaluate.describe_classification(scores, self.y, "gradient")}

    def _bayes(self, draws: int) -> dict:
        few = spread(len(self.x), self.config.bayes_images)
        scores = {rule: self._scores(self.flow, self.x[few], rule, draws) for rule in ("bayes", "gradient")}
        agreement = (scores["bayes"].argmax(1) == scores["gradient"].argmax(1)).double().mean()
        described = evaluate.describe_classification(scores["bayes"], self.y[few], "bayes")
        return {"noise_draws": draws, **described, "agreement": float(agreement)}

    @torch.no_grad()
    def _nats(self, flow: TarFlow) -> float:
        generator, total = torch.Generator().manual_seed(self.evaluation.seed), 0.0
        for x, y in zip(*(t.split(self.evaluation.batch_size) for t in (self.x, self.y)), strict=True):
            noisy = add_noise(x, flow.config.noise_std, self.data.bin_width, generator)
            loss = likelihood_loss(flow, noisy.to(flow.var.device), y.to(flow.var.device))[0]
            total += float(loss) * len(x) / len(self.x)
        return total

    def _settings(self, *names: str) -> dict:
        own = to_mapping(self.config)
        return {
            **{name: own[name] for name in names},
            "batch_size": self.evaluation.batch_size,
            "seed": self.evaluation.seed,
        }

    def _kept(self, name: str, settings: tuple[str, ...], compute, *arguments):
        key = {**self._settings(*settings), "weights": self.weights}
        return kept(self.run / "evaluation", name, key, lambda: compute(*arguments))
