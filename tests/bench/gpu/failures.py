"""A plugin of pytest that shows a failure as soon as it is known: `-p tests.bench.gpu.failures`."""

import os

import pytest

_SHOWN = 2500  # characters of a failure, the last


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Prints the name and the end of the traceback, from the process that collects the reports."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n** {report.nodeid} ({report.when})\n{report.longreprtext[-_SHOWN:]}", flush=True)
