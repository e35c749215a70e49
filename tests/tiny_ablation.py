"""Ablations of flows that train in a second, for the tests."""

import tiny_training
import yaml

from biflow.config import to_mapping

EVALUATION = dict(samples=60, guidances=[0.0, 1.0], judge_steps=20, batch_size=60, noise_draws=1)
ALIGN = "representation={features: [[-1, 0]], projector_width: 8, encoder: {steps: 2, seed: 0}, cache_features: true}"


def write_study(tmp_path):
    """Data and two rows in a folder, which is returned: the exact inverse, and a learned one of the same flow."""
    data = tiny_training.write_images(tmp_path / "images.npz", count=400)
    for stage, config in (
        ("flow", tiny_training.flow_config(data, 6, 3)),
        ("inverse", tiny_training.inverse_config(data, 6, 3)),
    ):
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump({"stage": stage, **to_mapping(config)}))
    exact = dict(title="exact", flow="flow.yaml", evaluation=EVALUATION)
    learned = exact | dict(title="learned", inverse="inverse.yaml")
    for name, row in (("exact", exact), ("learned", learned)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(row))
    return tmp_path


def semantics_row(study, name, more=(), **changes):
    """A row with semantics in a file; `more` are settings of the flow."""
    semantics = dict(classify_images=20, bayes_images=8, noise_draws=2, probe=dict(train_images=60, tokens=2))
    semantics |= dict(curve_samples=60, table_features=[[1, 0]]) | changes
    settings = ["run.keep=10", "run.checkpoint_every=2", *more]
    row = dict(title=name, flow="flow.yaml", flow_settings=settings, evaluation=EVALUATION, semantics=semantics)
    (study / f"{name}.yaml").write_text(yaml.safe_dump(row))
    return study / f"{name}.yaml"
