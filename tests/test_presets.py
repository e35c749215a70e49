"""Presets: the sizes that are known of the paper's models, that pairs fit, and one step of every one, made small."""

import functools
import re
import shlex
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import tiny_latents
import torch
import yaml
from tiny_training import same_weights

import biflow
from biflow import cli, presets, train
from biflow.config import to_mapping
from biflow.data import DataConfig, load
from biflow.data.images import split_indices
from biflow.evaluate import check_pair

INVERSES = [name for name in presets.names() if name.endswith("_inverse")]
SMALL = (
    "model.width=16", "model.head_dim=8", "model.num_blocks=2", "optim.steps=1", "optim.batch_size=2",
    "optim.warmup_steps=0", "run.tensorboard=false", "run.threads=1", "run.validate_images=2",
)  # fmt: skip
ALIGNED = ("representation.features=[[-1, 0], [0, 0]]", "representation.encoder={name: self_supervised, steps: 1}")
DEPTH = {"flow": "model.layers_per_block=1", "inverse": "model.layers_per_group=1"}


IMAGENET = [name for name in presets.names() if name.startswith("imagenet")]
IMAGENET_IMAGES = 1_281_167  # of 1,000 classes of 732 to 1,300 images, 895 of them of 1,300


def text(name):
    return (resources.files("biflow.presets") / f"{name}.yaml").read_text()


def build(name, overrides=()):
    settings = presets.training(name, overrides)
    return settings, (biflow.TarFlow if isinstance(settings, train.FlowTraining) else biflow.BiFlow)(settings.model)


def flow_of(inverse):
    return inverse.removesuffix("inverse") + "flow"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What the presets' comments ask for: beginning of a preset's name -> data.source."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    gray = rng.randint(0, 256, (20, 28, 28)).astype(np.uint8)
    np.savez(folder / "fashion.npz", images=gray, labels=np.arange(20) % 10)
    tiny_latents.write_latents(folder / "latents", count=1000, classes=1000, side=32)
    pixels = rng.randint(0, 256, (1000, 64, 64, 3)).astype(np.uint8)
    np.savez(folder / "imagenet64.npz", images=pixels, labels=np.arange(1000))
    (folder / "images").mkdir()
    for k in range(4):
        Image.fromarray(rng.randint(0, 256, (40, 36, 3)).astype(np.uint8)).save(folder / f"images/{k}.png")
    return {
        "digits": "digits",
        "fashion": str(folder / "fashion.npz"),
        "folder": str(folder / "images"),
        "imagenet256": str(folder / "latents"),
        "imagenet64": str(folder / "imagenet64.npz"),
    }


@pytest.mark.parametrize(
    ("name", "millions"),
    [("imagenet256_b2_flow", 120), ("imagenet256_xl2_flow", 690), ("imagenet256_b2_inverse", 133)],
)
def test_preset_parameter_counts(name, millions):
    """The paper's counts, within 3% (arXiv 2512.10953)."""
    with torch.device("meta"):
        settings, model = build(name)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e6 * millions, rel=0.03)
    c = settings.model
    assert (c.tokens, c.channels, c.num_blocks) == (256, 16, 8)
    assert (c.norm, c.gate, c.qk_norm, c.rope) == ("rmsnorm", "swiglu", True, True)
    assert c.class_tokens > 0


@pytest.mark.parametrize("name", presets.names())
def test_info_says_what_a_preset_is_and_its_data(name, capsys):
    assert cli.main(["info", name]) == 0
    about, rest = capsys.readouterr().out.split("\n\nparameters: ")
    count, settings = rest.split("\n\n", 1)
    with torch.device("meta"):
        model = build(name)[1]
    assert int(count.replace(",", "")) == sum(p.numel() for p in model.parameters())
    assert about.startswith("Stage ")
    assert "#" not in about
    assert yaml.safe_load(settings) == presets.read(name)


def test_aligned_presets_have_the_papers_settings():
    """FlowBack's (arXiv 2511.22345, section 5 and table 6); what the flow of the same name without alignment has."""
    for name in ("imagenet64_aligned_flow", "imagenet256_aligned_flow"):
        settings = presets.training(name)
        own, model, optim = settings.representation, settings.model, settings.optim
        assert own.pairs(model) == ((7, 5), (6, 5))
        assert (own.weight, own.projector_width, model.tokens, model.width) == (0.1, 1024, 256, 1024)
        assert (optim.batch_size, optim.lr, optim.ema, optim.weight_decay) == (256, 1e-4, 0.9999, 1e-4)
    assert presets.training("imagenet256_aligned_flow").model.noise_std == 0.2
    for name in ("digits", "fashion"):
        aligned, plain = (presets.read(f"{name}_{kind}") for kind in ("aligned_flow", "flow"))
        assert {k: v for k, v in aligned.items() if k != "representation"} == plain


def test_sizes_grow():
    def count(name):
        with torch.device("meta"):
            return sum(p.numel() for p in build(name)[1].parameters())

    for stage in ("flow", "inverse"):
        small, middle, large = (count(f"imagenet256_{size}_{stage}") for size in ("b2", "l2", "xl2"))
        assert 1.5 * small < middle < large / 1.5


@pytest.mark.parametrize("name", INVERSES)
def test_an_inverse_fits_the_flow_of_its_name(name):
    with torch.device("meta"):
        (settings, rev), (flow_settings, flow) = build(name), build(flow_of(name))
    check_pair(rev, flow)
    assert to_mapping(settings.data) == to_mapping(flow_settings.data)


@functools.cache
def held_out_of_imagenet(fraction):
    """How many images of each class, with classes of as many images as those of ImageNet have."""
    others = IMAGENET_IMAGES - 895 * 1300
    counts = [1300] * 895 + [732, 1299] + [(others - 2031) // 103] * 103
    counts[-1] += IMAGENET_IMAGES - sum(counts)
    labels = torch.repeat_interleave(torch.arange(1000), torch.tensor(counts))
    train_rows, held_out = split_indices(len(labels), labels, fraction, 0)
    return len(train_rows), labels[held_out].bincount(minlength=1000)


@pytest.mark.parametrize("name", IMAGENET)
def test_epochs_of_imagenet_are_what_they_are_said_to_be(name):
    """By the preset's comment, and by docs/scaling.md; what is held out is an image a class, all of it validated on."""
    settings = presets.training(name)
    count, held_out = held_out_of_imagenet(settings.data.val_fraction)
    assert held_out.unique().tolist() == [1]
    assert held_out.sum() <= settings.run.validate_images
    (claim,) = re.findall(r"(\d+) epochs of ([\d,]+) images", text(name))
    assert int(claim[1].replace(",", "")) == count == IMAGENET_IMAGES - 1000
    optim = settings.optim
    assert optim.steps * optim.batch_size / count == pytest.approx(int(claim[0]), rel=2e-4)
    if "one epoch" in text(name):
        assert optim.warmup_steps == round(count / optim.batch_size)
    if "aligned" not in name:
        plan = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
        said = re.search(r"batch (\d+), (\d+) epochs of\sstage one and (\d+) of stage two, of ([\d,]+) images", plan)
        epochs = said[2] if name.endswith("flow") else said[3]
        assert (said[1], epochs, said[4]) == (str(optim.batch_size), *claim)


def test_imagenet_is_read_ahead_which_changes_no_bit(sources, tmp_path):
    assert {presets.training(name).data.workers for name in IMAGENET} == {2}
    given = (*SMALL, DEPTH["flow"], f"data.source={sources['imagenet256']}", "data.flip=true", "optim.steps=5")
    ahead, inline = (
        train.train_flow(presets.training("imagenet256_b2_flow", (*given, *more)), tmp_path / name, progress=False)
        for name, more in (("ahead", ()), ("inline", ("data.workers=0",)))
    )
    assert same_weights(ahead, inline)


@pytest.mark.parametrize("name", [name for name in INVERSES if name in IMAGENET])
def test_the_perceptual_terms_in_a_comment_are_settings(name):
    lines = text(name).splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith("#   decoder="))
    words = shlex.split(" ".join(line.strip("#\\") for line in lines[first : first + 2]))
    settings = presets.training(name, words)
    assert settings.decoder == "stabilityai/sd-vae-ft-ema"
    assert [term.backbone for term in settings.perceptual] == ["lpips", "convnext_v2"]


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_says_its_data_and_trains_a_step_on_it(name, sources, tmp_path):
    source = next(source for kind, source in sources.items() if name.startswith(kind))
    comments = "".join(line for line in text(name).splitlines() if line[:1] == "#")
    assert "digits" in comments if source == "digits" else "data.source=" in comments
    stage = name.rpartition("_")[2]
    given = (*SMALL, f"data.source={source}", *(ALIGNED if "representation" in presets.read(name) else ()))
    settings = presets.training(name, (*given, DEPTH[stage]))
    if stage == "flow":
        model = train.train_flow(settings, tmp_path / "run", progress=False)
    else:
        flow = build(flow_of(name), (*given, DEPTH["flow"]))[1]
        model = train.train_inverse(settings, flow, tmp_path / "run", progress=False)
    assert biflow.load(tmp_path / "run" / "model.safetensors").config == settings.model
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_latents_are_read_as_they_are_stored_and_drawn_as_they_are(tmp_path):
    latents = np.random.RandomState(0).standard_normal((100, 32, 32, 4)).astype(np.float16)
    np.savez(tmp_path / "latents.npz", images=latents, labels=np.arange(100))
    data = load(DataConfig(source=str(tmp_path / "latents.npz")))
    assert (data.channels, data.img_size, data.num_classes, data.bin_width) == (4, 32, 100, None)
    assert float(data.train_x.batch(torch.arange(8)).abs().max()) > 2
    flow = biflow.TarFlow(
        biflow.TarFlowConfig(img_size=4, in_channels=4, patch_size=2, width=16, head_dim=8, num_blocks=1)
    )
    biflow.save(flow, tmp_path / "flow.safetensors")
    words = ["sample", str(tmp_path / "flow.safetensors"), "--n", "50", "--out", str(tmp_path / "drawn.npz")]
    assert cli.main(words) == 0
    drawn = np.load(tmp_path / "drawn.npz")["images"]
    assert drawn.shape == (50, 4, 4, 4)
    assert np.abs(drawn).max() > 2  # not clamped to [-1, 1]
    assert load(DataConfig(source=str(tmp_path / "drawn.npz"))).channels == 4


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 4, 4, 4), np.uint8), r"\(N,H,W,C\) in floating point for latents; got uint8 \(2, 4, 4, 4\)"),
        (np.full((2, 4, 4, 4), np.inf), "expected finite latents, got values in"),
        (np.full((2, 4, 4, 3), 2.0), r"expected values in \[-1, 1\], got values in \[2, 2\]"),
        (np.zeros((2, 4, 4, 0)), r"or \(N,H,W,C\) in floating point for latents; got float64"),
    ],
    ids=["bytes", "infinite", "RGB", "nothing"],
)
def test_what_is_no_latent_is_refused(array, reason, tmp_path):
    np.savez(tmp_path / "bad.npz", images=array)
    with pytest.raises(ValueError, match=reason):
        load(DataConfig(source=str(tmp_path / "bad.npz")))
