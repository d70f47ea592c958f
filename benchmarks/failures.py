"""A pytest plugin that prints each failure when it happens, for runs that may be cut off.

pytest -p benchmarks.failures
"""

import pytest


class Failures:
    """Prints each failure with its traceback, where pytest prints its progress.

    Args:
        reporter: pytest's reporter, whose class is public since version 9.
    """

    def __init__(self, reporter: "pytest.TerminalReporter") -> None:
        self.reporter = reporter

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """After a test's setup, call or teardown."""
        self._tell(report)

    @pytest.hookimpl(trylast=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """After a file is read."""
        self._tell(report)

    def _tell(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            self.reporter.ensure_newline()
            self.reporter.write_line(f"{report.nodeid}\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin if there is a terminal; workers of pytest-xdist have none."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        config.pluginmanager.register(Failures(reporter))
