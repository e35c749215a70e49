"""torch-fidelity's Inception-v3 with random weights, where torchvision cannot be imported too."""

import contextlib
import sys
from types import ModuleType

import pytest
import torch

# what torch-fidelity imports from torchvision at its own import, for networks and data sets that biflow does not use
WANTED = {
    "torchvision": (),
    "torchvision.datasets": ("CIFAR10", "CIFAR100", "STL10"),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": (),
}


def import_torch_fidelity() -> None:
    """torch-fidelity as users have it, who have torchvision; without, it is imported beside empty modules."""
    if "torch_fidelity" in sys.modules:
        return
    with contextlib.suppress(ImportError, RuntimeError):
        import torch_fidelity

        return
    broken = [name for name in sys.modules if name.partition(".")[0] in ("torch_fidelity", "torchvision")]
    for name in broken:
        del sys.modules[name]
    for name, classes in WANTED.items():
        sys.modules[name] = module = ModuleType(name)
        for each in classes:
            setattr(module, each, type(each, (), {}))
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    finally:
        for name in WANTED:
            del sys.modules[name]


def write_inception(path):
    """A file of weights as torch-fidelity reads it: random ones under which activations keep their size."""
    import_torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    parts = {"load_state_dict_from_url": lambda *a, **k: None}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in parts.items():
            patch.setattr(theirs, name, value)
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        network = theirs.FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            gain = (2 / module.weight[0].numel()) ** 0.5
            module.weight.copy_(gain * torch.randn(module.weight.shape, generator=generator))
    network.fc.weight.copy_(torch.randn(network.fc.weight.shape, generator=generator))
    torch.save(network.state_dict(), path)
    return network
