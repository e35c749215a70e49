"""What tests/test_distributed_evaluation.py runs under torchrun: `distributed_evaluation_worker.py FOLDER`."""

import contextlib
import io
import os
import sys
from pathlib import Path

import torch

from biflow import cli, distributed, evaluate


def toy(images):
    """A network of few features, in the place of Inception. Of no images it knows nothing."""
    assert len(images)
    x = images.double().mean((2, 3)) / 255
    pool = torch.cat([x, x.square(), torch.sin(9 * x[:, :1])], 1)
    return {"pool": pool.float(), "spatial": pool[:, :4].float(), "logits": 5 * pool.float()}


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    """Lines by name; what they write is in `out`."""
    flow, inverse = f"{folder}/flow.safetensors", f"{folder}/inverse.safetensors"
    data, score = ["--data", f"{folder}/images.npz"], ["score", "--quiet", "--reference"]
    encode = ["latents", "encode", f"{folder}/encoded/images", "--vae", f"{folder}/encoded/vae", "--img-size", "16"]
    encode += ["--batch", "3", "--shard", "8", "--dtype", "fp32", "--quiet", "--out"]
    return {
        "score_arrays": [*score, f"{folder}/images.npz", f"{folder}/other.npz", "--batch-size", "7"],
        "score_folder": [*score, f"{folder}/other.npz", f"{folder}/encoded/images", "img_size=16"],
        "score_one": [*score, f"{folder}/other.npz", f"{folder}/one.npz", "--save-statistics", f"{out}/one.npz"],
        "evaluate": [
            "evaluate",
            inverse,
            "--flow",
            flow,
            *data,
            "--samples",
            "301",
            "--guidance",
            "0",
            "--guidance",
            "2",
        ],
        "evaluate_one": ["evaluate", flow, *data, "--samples", "1", "--guidance", "1"],
        "encode": [*encode, f"{out}/latents"],
        "encode_again": [*encode, f"{out}/begun"],
        "sample": ["sample", flow, "--n", "200", "--batch", "48", "--out", f"{out}/samples.npz"],
        "info": ["info"],
        "check": ["data", "check", f"{folder}/images.npz"],
    }


if __name__ == "__main__":
    folder, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), os.environ["RANK"]
    torch.set_num_threads(1)
    evaluate.Inception = lambda weights, device: toy
    leave, lines = distributed.leave, commands(folder, out)
    for name, line in lines.items():
        # a group that was left cannot be joined again
        distributed.leave = leave if name == list(lines)[-1] else lambda: None
        said, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = cli.main(line)
        (out / f"{name}_{rank}.out").write_text(said.getvalue())
        (out / f"{name}_{rank}.err").write_text(errors.getvalue())
        (out / f"{name}_{rank}.code").write_text(str(code))
