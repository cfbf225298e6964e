"""pytest's side of the suite: options, fixtures, header, summary. All work is done in attn_impls.harness."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from attn_impls.harness import options, plugin, workers
from attn_impls.harness.case import Case, direction_of
from attn_impls.harness.judge import Problem
from attn_impls.harness.session import Session
from attn_impls.harness.spread import Spreads
from attn_impls.registry import Implementation
from attn_impls.workload import Workload

workers.pin()


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    plugin.configure(config)


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Session:
    """The run: device, clock, and what has been found so far."""
    return plugin.session_of(pytestconfig)


@pytest.fixture(scope="module")
def workload(request: pytest.FixtureRequest) -> Workload:
    return request.param


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return request.param


@pytest.fixture(scope="module")
def problem(suite: Session, workload: Workload) -> Problem:
    """q, k, v of a workload, generated once for all implementations, and the right answer; one workload's at a time."""
    return Problem(workload, suite.device, suite.selection.seed)


@pytest.fixture(scope="session")
def spreads(suite: Session) -> Spreads:
    """What the ranks check and time together, under torchrun."""
    return suite.spreads


@pytest.fixture
def case(request: pytest.FixtureRequest, suite: Session, workload: Workload, implementation: Implementation) -> Case:
    """One implementation on one workload, in the direction that the test is marked with; skipped where it cannot be tried."""
    found = Case(workload, implementation, suite.device, direction_of(request.node))
    suite.admit(found)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plugin.parametrize(metafunc)


def pytest_itemcollected(item: pytest.Item) -> None:
    plugin.mark_collected(item)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    plugin.modify_items(config, items)


def pytest_collection_finish() -> None:
    plugin.collection_finished()


def pytest_report_header(config: pytest.Config) -> list[str]:
    return plugin.report_header(config)


def pytest_report_teststatus(report: Any, config: pytest.Config) -> tuple[str, str, str] | None:
    return plugin.report_status(report, config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with plugin.watched(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    plugin.note_report(item, report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    try:
        return (yield)
    finally:  # a --benchmark-compare-fail that fails raises in here
        plugin.write_summary(terminalreporter, config)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any] | None:
    return plugin.known_machine_info(config)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    plugin.update_machine_info(config, machine_info)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    plugin.update_json(config, output_json)


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    plugin.refuse_other_device(machine_info, compared_benchmark)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return workers.auto_workers()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return workers.scheduler(config, log)
