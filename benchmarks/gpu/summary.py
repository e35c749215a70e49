"""What is printed last: the rows that decide, what failed, the status of the parts. All rows are in the JSON."""

import re

from benchmarks.timing import table

LABELS = ("limit", "decode", "phases", "op", "item", "number", "case", "batch", "precision", "who")  # what names a row
DECIDING = (("B/2", 1), ("B/2", 64), ("B/2", 256), ("TARFlow-64", 1), ("TARFlow-64", 64))  # flows, batches
KERNELS = (  # parts of op and case
    ("affine_encode", "fp32, 403 MB"),
    ("affine_decode", "fp32, 403 MB"),
    ("attention_qkv", "B/2 reverse batch 64"),
    ("attention_qkv", "TARFlow-64 batch 16"),
    ("add_norm", "B/2 batch 64"),
    ("gate swiglu", "B/2 batch 64"),
    ("jacobi_update_", "503 MB"),
)
READ_MB = 28.4  # of the rates at which weights are read
FAILURES = 10  # lines
WIDTH = 180  # of a line


def summary(about: dict, found: dict) -> list[str]:
    lines = [f"{about['device']} · torch {about['torch']} · commit {about['commit']} · {about['date']}"]
    for name, part in found.items():
        rows = [{k: v for k, v in row.items() if k != "failed"} for row in part.get("rows", []) if measured(row)]
        for group in deciding(name, rows):
            lines += ["", *table(group)] if group else []
    failures = [line for name, part in found.items() for line in failed(name, part)]
    lines += ["", *failures[:FAILURES]]
    if len(failures) > FAILURES:
        lines.append(f"and {len(failures) - FAILURES} more that failed: in the JSON")
    lines.append("")
    for name, part in found.items():
        left = sum("left_out" in row for row in part.get("rows", []))
        said = f"{left} rows left out" if left else ""
        if part["status"] != "ok":
            said = "; ".join([last_line(part.get("output", "")), *([said] if said else [])])
        lines.append(f"{name:12} {part['status']:12} {part.get('seconds', 0):5.0f} s  {said}".rstrip())
    return [line[:WIDTH] for line in lines]


def measured(row: dict) -> bool:
    """Whether a row says more than what it is: of several contestants some may have failed."""
    return bool(row.keys() - {*LABELS, "blocks", "mb", "n", "failed"}) and "left_out" not in row


def deciding(name: str, rows: list[dict]) -> list[list[dict]]:
    """Tables of a part."""
    if name == "decode":
        return [decodes([row for row in rows if "who" in row])]
    if name == "machine":
        kept = [row for row in rows if row.get("mb", READ_MB) == READ_MB]
        return [[row for row in kept if "us" in row], [row for row in kept if "gb_s" in row]]
    if name == "models":
        return [[row for row in rows if not row["item"].startswith(" ")]]
    if name == "kernels":
        return [[row for row in rows if (row["op"], row["case"]) in KERNELS]]
    kinds: dict[str, list[dict]] = {}  # of `compiled`, rows of models and of kernels
    for row in rows:
        kinds.setdefault(next(iter(row)), []).append(row)
    return list(kinds.values())


def decodes(rows: list[dict]) -> list[dict]:
    """A row for each deciding flow, batch and precision: the sequential solver, auto, and how much longer others take.

    x_...: times the sequential solver's.
    """
    found = []
    for precision in ("bf16", "fp32"):
        for name, batch in DECIDING:
            of = {r["who"]: r for r in rows if (r["decode"], r["batch"], r["precision"]) == (name, batch, precision)}
            if not of:
                continue
            line = {"decode": name, "batch": batch, "precision": precision}
            ours, auto = of.pop("sequential", {}), of.pop("auto", {})
            columns = ("us_step", "ms_image", "percent_of_limit", "percent_of_read", "error")
            line |= {column: ours[column] for column in columns if column in ours}
            line |= {"ms_auto": auto["ms_image"], "auto": auto["method"]} if auto else {}
            line |= {f"x_{who}": row["x_sequential"] for who, row in of.items() if "x_sequential" in row}
            found.append(line)
    return found


def failed(name: str, part: dict) -> list[str]:
    """Rows that failed, tests that failed, each once."""
    lines = []
    for row in part.get("rows", []):
        if "failed" in row:
            labels = [str(row[key]).strip() for key in LABELS if key in row]
            lines.append(f"failed: {name}: {', '.join(labels)}: {row['failed']}")
    if name == "tests":
        said = re.findall(r"^FAILED (\S+): (.*)$", part.get("output", ""), re.MULTILINE)  # first_failures.py
        lines += [f"failed: {test}: {why}" for test, why in dict(said).items()]
    return lines


def last_line(text: str) -> str:
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return said[-1] if said else ""
