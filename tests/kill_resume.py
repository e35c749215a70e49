"""Kill a training run with SIGKILL at random moments and resume it; the end must be that of a run left in peace.

`python tests/kill_resume.py --kills 20 --stage flow` runs it once by hand; tests/test_resume.py runs it with 3 kills.
The runs are processes forked from a server that has imported torch already.
"""

import argparse
import json
import multiprocessing
import random
import signal
import tempfile
import time
from pathlib import Path

STAGES = ("flow", "inverse", "perceptual")  # the last: the inverse with perceptual terms
TIMEOUT = 120.0  # seconds without progress


def worker(stage: str, folder: Path, steps: int) -> None:
    """Train, or continue."""
    from tiny_perceptual import CONVOLUTIONS, with_terms
    from tiny_training import flow_config, inverse_config, random_flow

    from biflow import train

    data = folder.parent / "images.npz"
    if stage == "flow":
        train.train_flow(flow_config(data, steps, every=5, log_every=1), folder, resume=True, progress=False)
    else:
        flow = random_flow(flow_config(data).model)
        config = inverse_config(data, steps, every=5, log_every=1)
        if stage == "perceptual":
            terms = {"backbone": "classifier", "steps": 20}, {"backbone": CONVOLUTIONS, "crop": 8}
            config = with_terms(config, *terms)
        train.train_inverse(config, flow, folder, resume=True, progress=False)


def start(stage: str, folder: Path, steps: int) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["biflow.train", "torch._dynamo"]
    )  # the optimizer imports the latter when first used
    process = context.Process(target=worker, args=(stage, folder, steps))
    process.start()
    return process


def last_step(folder: Path) -> int:
    """The newest step in metrics.jsonl; the file may be half written."""
    try:
        lines = (folder / "metrics.jsonl").read_text().split("\n")
    except FileNotFoundError:
        return 0
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def kill_at(process: multiprocessing.Process, folder: Path, step: int, delay: float) -> None:
    """SIGKILL `delay` seconds after the run reached `step`."""
    deadline = time.monotonic() + TIMEOUT
    while last_step(folder) < step:
        if not process.is_alive() or time.monotonic() > deadline:
            raise AssertionError(f"the run did not reach step {step}: exit code {process.exitcode}")
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise AssertionError(f"the run ended (exit code {process.exitcode}) before it was killed; give it more steps")


def check(stage: str, kills: int, folder: Path, seed: int, steps: int, say=lambda text: None) -> None:
    """AssertionError unless a run killed `kills` times ends in the files of one that was not killed."""
    from tiny_training import write_images

    write_images(folder / "images.npz")
    rng = random.Random(seed)
    calm, killed = folder / "calm", folder / "killed"
    finish(start(stage, calm, steps))
    reached = 0
    for target in sorted(
        rng.randrange(steps * 3 // 4) for _ in range(kills)
    ):  # the last quarter is for the last resume
        starting = rng.random() < 0.3  # while it imports, reads the checkpoint or makes the folder
        reached = reached if starting else target
        process = start(stage, killed, steps)
        kill_at(process, killed, reached, rng.uniform(0, 0.5 if starting else 0.05))
        found = sorted(p.name for p in (killed / "checkpoints").glob("*")) if killed.exists() else []
        say(f"killed at step {last_step(killed)} (aimed at {reached}); checkpoints: {' '.join(found) or 'none'}")
    finish(start(stage, killed, steps))
    own = [p.name for p in calm.glob("perceptual_*")]
    assert bool(own) == (stage == "perceptual"), "the classifier is in the run folder"
    for name in ("model.safetensors", f"checkpoints/step_{steps:08d}/model.safetensors", *own):
        assert (calm / name).read_bytes() == (killed / name).read_bytes(), f"{name} differs"
    assert raw_state(calm, steps) == raw_state(killed, steps), "weights, moments or generator differ"
    assert metrics(calm) == metrics(killed), "metrics.jsonl differs"
    assert not [p for p in killed.rglob(".tmp-*")], "leftovers of a killed process"


def finish(process: multiprocessing.Process) -> None:
    process.join(TIMEOUT)
    if process.exitcode != 0:
        process.kill()
        raise AssertionError(f"the run failed: exit code {process.exitcode}")


def raw_state(folder: Path, steps: int) -> dict:
    """Everything in the last training state but the clock."""
    from biflow import checkpoint

    contents = checkpoint.read(folder / f"checkpoints/step_{steps:08d}/state.safetensors")
    contents.metadata.pop("seconds")
    return {k: v.numpy().tobytes() for k, v in contents.tensors.items()} | {"metadata": contents.metadata}


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl but for the clock."""
    from biflow.train.speed import CLOCK

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description="kill and resume a tiny training run; exit code 0: nothing was lost")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stage", choices=STAGES, default="flow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(options.stage, options.kills, Path(folder), options.seed, options.steps, print)
    print(f"{options.stage}: killed {options.kills} times, the same bits as a run that was not")


if __name__ == "__main__":
    main()
