"""The networks of `biflow score`: torch-fidelity's Inception-v3 and timm's DINOv2, with random weights from files."""

import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_inception import import_torch_fidelity, write_inception
from torch import nn

from biflow import cli, evaluate
from biflow.evaluate import networks


def pictures(count, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    write_inception(path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return evaluate.Inception(str(weights))


def test_inception_gives_what_torch_fidelity_gives(inception, weights):
    """pool and logits are theirs; spatial is the first 7 channels of mixed_6/conv in ADM's order."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(weights))
    given = []
    theirs.Mixed_6d.register_forward_hook(lambda layer, args, output: given.append(args[0]))
    images = pictures(2, side=11)
    pool, logits = theirs(images)
    got = inception(images)
    assert {name: tuple(value.shape) for name, value in got.items()} == {
        "pool": (2, 2048), "spatial": (2, 17 * 17 * 7), "logits": (2, 1008),
    }  # fmt: skip
    torch.testing.assert_close(got["pool"], pool)
    torch.testing.assert_close(got["logits"], logits)
    layer = theirs.Mixed_6d.branch1x1
    want = F.relu(layer.bn(F.conv2d(given[0], layer.conv.weight)))
    for row, column, channel in itertools.product(range(0, 17, 4), range(0, 17, 5), range(7)):
        place = (row * 17 + column) * 7 + channel
        torch.testing.assert_close(got["spatial"][:, place], want[:, channel, row, column])
    assert want[:, :7].std() > 0.01, "features that could not differ"


@pytest.mark.slow
def test_features_and_scores_do_not_depend_on_the_batch(inception):
    """9 images: the rounding of fp32 convolutions is all that changes. Distances of 64 features, which take no time."""

    def distance(a, b):
        return evaluate.gaussian_distance(*(evaluate.Moments.of(s.pool[:, :64]) for s in (a, b)))

    images, reference = pictures(9), evaluate.measure([pictures(9, seed=1)], [inception])
    found = []
    for size in (1, 7, 500):
        statistics = evaluate.measure(images.split(size), [inception])
        score, _ = evaluate.inception_score(statistics.logits)
        found.append({"fid": distance(statistics, reference), "score": score, "pool": statistics.pool})
        torch.testing.assert_close(statistics.moments["pool"].mean, statistics.pool.double().mean(0))
    for other in found[1:]:
        torch.testing.assert_close(other["pool"], found[0]["pool"], rtol=1e-4, atol=1e-5)
        assert other["fid"] == pytest.approx(found[0]["fid"], rel=1e-6)
        assert other["score"] == pytest.approx(found[0]["score"], rel=1e-6)
    assert found[0]["fid"] > 1e-3
    assert found[0]["score"] > 1.01


def test_the_command_keeps_what_adms_references_have(weights, tmp_path, capsys):
    np.savez(tmp_path / "s.npz", arr_0=pictures(4).permute(0, 2, 3, 1).numpy())
    line = ["score", str(tmp_path / "s.npz"), "--inception", str(weights), "--save-statistics"]
    assert cli.main([*line, str(tmp_path / "kept.npz"), "--batch-size", "3", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["inception_score"] > 1
    assert (report["fid"], report["precision"], report["fd_dinov2"]) == (None, None, None)
    with np.load(tmp_path / "kept.npz", allow_pickle=False) as file:
        shapes = {name: file[name].shape for name in file.files}
    assert shapes == {
        "mu": (2048,), "sigma": (2048, 2048), "count_pool": (), "pool": (4, 2048),
        "mu_s": (2023,), "sigma_s": (2023, 2023), "count_spatial": (),
    }  # fmt: skip


def test_inception_says_what_is_wrong_with_weights(tmp_path, monkeypatch):
    import_torch_fidelity()
    with pytest.raises(FileNotFoundError, match=r"Inception-v3: .*none.pth: no such file"):
        evaluate.Inception(str(tmp_path / "none.pth"))
    torch.save({"conv": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: expected torch-fidelity's weights of Inception-v3.*Missing key"):
        evaluate.Inception(str(tmp_path / "other.pth"))
    torch.save({"code": SimpleNamespace}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="one that would have to be unpickled"):
        evaluate.Inception(str(tmp_path / "code.pth"))

    def no_network(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", no_network)
    with pytest.raises(FileNotFoundError, match=r"torch.hub, or a network.*no route.*--inception PATH"):
        evaluate.Inception()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"expected torch_fidelity, .*pip install 'biflow\[evaluation\]'"):
        evaluate.Inception()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"DINOv2: expected timm, .*pip install 'biflow\[evaluation\]'"):
        evaluate.DINOv2()


# --- DINOv2


class Transformer(nn.Module):
    """Shaped as timm's: a class token that has seen all patches and their positions, then the patches."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 6, 14, stride=14)
        self.patch_embed.patch_size, self.patch_embed.grid_size = (14, 14), (37, 37)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 37**2, 6, generator=torch.Generator().manual_seed(0)))

    def forward_features(self, x):
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.new_zeros(len(x), 1, 6), tokens], 1) + self.pos_embed
        tokens[:, 0] += tokens[:, 1:].square().sum(1)
        return tokens


@pytest.fixture
def timm(monkeypatch):
    def create_model(name, pretrained, num_classes, dynamic_img_size):
        if pretrained:
            raise ConnectionError("no route")
        return Transformer()

    listed = ["vit_large_patch14_dinov2"]
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model, list_models=lambda f: listed))


def test_dinov2_is_the_class_token_of_resized_images(timm, tmp_path):
    from PIL import Image

    own = Transformer()
    torch.save(own.state_dict(), tmp_path / "dinov2.pth")
    network = evaluate.DINOv2(str(tmp_path / "dinov2.pth"))
    images = pictures(3, side=32)
    got = network(images)["dinov2"]
    resized = [
        np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC))
        for image in images
    ]
    x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    own.pos_embed = nn.Parameter(networks.resized_positions(own.pos_embed.detach(), 16))
    torch.testing.assert_close(got, own.forward_features(x)[:, 0].detach(), rtol=1e-4, atol=1e-4)
    alone = torch.cat([network(images[k : k + 1])["dinov2"] for k in range(3)])
    torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


def test_positions_are_resized_by_the_scale_of_dinov2():
    """Of a ramp bicubic interpolation gives about the ramp, at the places where the scale 16.1 / 37 puts samples, which
    are up to 0.2 from where 16 / 37 would; and stripes do not become their mean, as antialiasing has it."""
    ramp = torch.arange(37.0).expand(37, 37)  # along the width
    table = torch.cat([torch.full((1, 1, 1), -5.0), ramp.reshape(1, -1, 1)], 1)
    got = networks.resized_positions(table, 16)
    assert got.shape == (1, 257, 1)
    assert float(got[0, 0, 0]) == -5
    places = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    inner = slice(1, 15)  # at the edge the ramp ends
    torch.testing.assert_close(got[0, 1:, 0].view(16, 16)[7, inner], places[inner], rtol=0, atol=0.06)
    assert torch.equal(networks.resized_positions(got, 16), got)
    table[0, 1:, 0] = ((-1) ** ramp).flatten()
    assert networks.resized_positions(table, 16)[0, 1:].std() > 0.5


def test_dinov2_says_what_to_do_offline(timm):
    with pytest.raises(FileNotFoundError, match=r"DINOv2: expected weights in the cache of timm.*--dinov2 PATH"):
        evaluate.DINOv2()
