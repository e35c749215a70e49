"""What flows know of classes, and how soon, as Markdown."""

from collections.abc import Callable

from biflow.ablation.curves import steps_to_reach
from biflow.ablation.results import cell

TITLES = {"frechet": "Frechet distance", "accuracy": "accuracy"}  # what a run has to reach


def semantics_table(results: dict[str, list[dict]]) -> str:
    """Three tables: classification and alignment, how soon a row is where the baseline ends, probes by layer.

    The baseline is the row without representation alignment that is trained for the most steps, the first of several;
    its end is the last point of its curve. Rows are compared with it seed by seed: the difference of both ends, the
    steps until the baseline's end is reached for good (`steps_to_reach`), and by how much the baseline's own steps to
    it are more. Frechet distances by different classifiers are not compared. "" if no row has semantics.
    """
    rows = {name: [r for r in found if "semantics" in r] for name, found in results.items()}
    rows = {name: found for name, found in rows.items() if found}
    if not rows:
        return ""
    parts = [_classification(rows), _curves(rows, _baseline(rows)), _probes(rows)]
    return "\n".join(part for part in parts if part)


def _baseline(rows: dict[str, list[dict]]) -> dict[int, dict]:
    """Seed -> result of the baseline that has a curve."""
    plain = [found for found in rows.values() if found[0]["configuration"]["flow"].get("representation") is None]
    longest = max(plain, key=lambda found: _steps(found[0]) or 0, default=[])
    return {r["seed"]: r for r in longest if r["semantics"]["curve"]}


def _steps(result: dict) -> int | None:
    """That the row's flow was trained for."""
    return result["configuration"]["flow"].get("optim", {}).get("steps")


def _table(rows: dict[str, list[dict]], columns: dict[str, Callable[[list[dict]], str]], notes: str) -> str:
    lines = [f"| | seeds | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for found in rows.values():
        cells = [found[0]["title"], str(len(found)), *(column(found) for column in columns.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", notes]) + "\n"


def _classification(rows: dict[str, list[dict]]) -> str:
    def of(group: str, name: str) -> Callable[[list[dict]], str]:
        return lambda found: cell([(r["semantics"].get(group) or {}).get(name) for r in found])

    def draws(found: list[dict]) -> str:
        numbers = {(r["semantics"].get("noisy_classification") or {}).get("noise_draws") for r in found} - {None}
        return ", ".join(map(str, sorted(numbers)))

    def alignment(found: list[dict]) -> str:
        floor = of("alignment", "floor")(found)
        return f"{of('alignment', 'cosine')(found)} ({floor})" if floor else ""

    columns = {
        "steps": lambda found: cell([_steps(r) for r in found]),
        "nats per dim, noisy": lambda found: cell([r["semantics"].get("noisy_nats_per_dim") for r in found]),
        "accuracy, gradient rule": of("classification", "accuracy"),
        "NLL": of("classification", "nll"),
        "ECE": of("classification", "ece"),
        "draws": draws,
        "accuracy, gradient rule, draws": of("noisy_classification", "accuracy"),
        "NLL, draws": of("noisy_classification", "nll"),
        "ECE, draws": of("noisy_classification", "ece"),
        "accuracy, Bayes' rule": of("bayes", "accuracy"),
        "rules agree": of("bayes", "agreement"),
        "accuracy, Bayes' rule, draws": of("noisy_bayes", "accuracy"),
        "rules agree, draws": of("noisy_bayes", "agreement"),
        "cosine with the encoder (floor)": alignment,
        "encoder's probe, pooled": lambda found: cell([(r.get("encoder") or {}).get("pooled") for r in found]),
        "encoder's probe, one token": lambda found: cell([(r.get("encoder") or {}).get("token") for r in found]),
    }
    return _table(
        rows,
        columns,
        "Of held-out images. Accuracy, NLL, ECE: by `TarFlow.classify`, of clean images or as a mean over draws of the "
        "training noise; Bayes' rule on fewer of them, where the rules agree as often as said. Nats per dim: of images "
        "with the training noise. Cosine: of what the projectors make of the aligned features with the encoder's; "
        "floor: of a prediction that ignores the image, each position's mean.",
    )


def _curves(rows: dict[str, list[dict]], baseline: dict[int, dict]) -> str:
    """ "" without a baseline that has curves."""
    if not baseline:
        return ""
    columns: dict[str, Callable[[list[dict]], str]] = {"steps": lambda found: cell([_steps(r) for r in found])}
    for name, title in TITLES.items():
        columns |= {
            f"{title} at the end": lambda found, name=name: cell([p[name] for p in _ends(found)]),
            f"{title} less the baseline's": lambda found, name=name: _differences(found, baseline, name),
            f"steps to the baseline's final {title}": lambda found, name=name: _reached(found, baseline, name),
            f"baseline's steps / own, {title}, by seed": lambda found, name=name: _ratios(found, baseline, name),
        }
    return _table(
        rows,
        columns,
        "By checkpoint, without guidance unless configured; accuracy: gradient rule, with draws if configured. Steps "
        "to: until the row is as good as the last checkpoint of the row without alignment of the same seed, and stays "
        "so; linear between checkpoints. Baseline's steps: until it has that level for good itself. A row's steps to a "
        "level are of one learning-rate schedule, which ends at its last step: compare rows of fewer steps by their "
        'ends. Not compared: Frechet distances by different classifiers ("another judge").',
    )


def _ends(found: list[dict]) -> list[dict]:
    """The last points of the curves."""
    return [r["semantics"]["curve"][-1] for r in found if r["semantics"]["curve"]]


def _pairs(found: list[dict], baseline: dict[int, dict], name: str) -> tuple[list[tuple[dict, dict]], str]:
    """(own result, the baseline's) by seed, and what is said of those that cannot be compared."""
    both = [(r, baseline[r["seed"]]) for r in found if r["seed"] in baseline and r["semantics"]["curve"]]
    fair = [(r, b) for r, b in both if name != "frechet" or r.get("judge_sha256") == b.get("judge_sha256")]
    left_out = len(both) - len(fair)
    return fair, f" ({left_out} of {len(both)}: another judge)" if left_out else ""


def _differences(found: list[dict], baseline: dict[int, dict], name: str) -> str:
    fair, note = _pairs(found, baseline, name)
    ends = [(r["semantics"]["curve"][-1][name], b["semantics"]["curve"][-1][name]) for r, b in fair]
    return cell([own - other for own, other in ends if None not in (own, other)]) + note


def _steps_of(fair: list[tuple[dict, dict]], name: str) -> list[tuple[float | None, float | None]]:
    """(own steps, the baseline's) to the level of the baseline's end."""
    found = []
    for result, other in fair:
        target = other["semantics"]["curve"][-1][name]
        found.append(tuple(steps_to_reach(r["semantics"]["curve"], target, name) for r in (result, other)))
    return found


def _reached(found: list[dict], baseline: dict[int, dict], name: str) -> str:
    fair, note = _pairs(found, baseline, name)
    steps = [own for own, _ in _steps_of(fair, name)]
    missed = f" ({steps.count(None)} of {len(steps)} never)" if None in steps else ""
    return (cell(steps) + missed + note).strip()


def _ratios(found: list[dict], baseline: dict[int, dict], name: str) -> str:
    fair, _ = _pairs(found, baseline, name)
    return ", ".join("never" if own is None else f"{other / own:.2f}" for own, other in _steps_of(fair, name))


def _probes(rows: dict[str, list[dict]]) -> str:
    first = next(iter(rows.values()))[0]["semantics"]
    chosen = [tuple(pair) for pair in first.get("settings", {}).get("table_features", ())]
    pairs = chosen or [(p["block"], p["layer"]) for p in first["probe"]]
    if not pairs:
        return ""

    def of(pair: tuple[int, int], name: str) -> Callable[[list[dict]], str]:
        def column(found: list[dict]) -> str:
            probes = [p for r in found for p in r["semantics"]["probe"] if (p["block"], p["layer"]) == pair]
            return cell([p.get(name) for p in probes])

        return column

    columns = {}
    for block, layer in pairs:
        columns |= {
            f"{block}:{layer}": of((block, layer), "accuracy"),
            f"{block}:{layer}, one token": of((block, layer), "token_accuracy"),
        }
    if not any(column(found) for name, column in columns.items() if "token" in name for found in rows.values()):
        columns = {name: column for name, column in columns.items() if "token" not in name}
    return _table(
        rows,
        columns,
        "Linear probes by block:layer from 0, blocks in encode order: held-out accuracy from the mean over tokens, and "
        "from the features of single tokens.",
    )
