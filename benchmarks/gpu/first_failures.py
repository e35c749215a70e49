"""A pytest plugin for a run that may be cut short: what matters most first, every failure in a line as it happens."""

from pathlib import Path

# of tests/kernels: what whole decodes need, then the rest, then tests of other folders
FIRST = ("test_sequential.py", "test_decode_block.py", "test_iterate.py", "test_passes.py", "test_attention.py")


def rank(path: Path) -> int:
    if path.parent.name != "kernels":
        return len(FIRST) + 1
    return FIRST.index(path.name) if path.name in FIRST else len(FIRST)


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: rank(item.path))  # stable: within a file as written


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the process that prints
        config.pluginmanager.register(Reporter())


class Reporter:
    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            print("\nFAILED", line(report.nodeid, report.longreprtext), flush=True)


def line(test: str, text: str) -> str:
    """The first line that pytest marks as the error; else of the text."""
    said = [part for part in text.splitlines() if part.strip()]
    errors = [part[1:].strip() for part in said if part.startswith("E ")]
    return f"{test}: {(errors or said or ['no reason'])[0][:250]}"
