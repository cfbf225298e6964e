"""The GitHub workflow runs the README's commands, and runs them when it should."""

import re
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
WORKFLOW = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())


def commands(job):
    """What a job runs of ours, a line each, as the README would write it."""
    for step in WORKFLOW["jobs"][job]["steps"]:
        for line in step.get("run", "").splitlines():
            if ".venv/bin/python -m attn_impls" in line or "pytest" in line:
                line = line.partition(" | tee")[0].replace('"${BASELINE:-HEAD}"', "origin/main")
                yield line if line.startswith("python3 -m venv") else line.replace(".venv/bin/", "")


def test_commands_are_the_readme_s():
    ours = list(commands("gpu"))
    assert [line.split()[3] for line in ours if "attn_impls" in line] == ["gate", "report", "report"]
    assert any("pytest" in line for line in ours)
    for line in ours:
        assert f"    {line}\n" in README


def test_cpu_job_runs_the_tests_lint_and_types():
    (run,) = (step["run"] for step in WORKFLOW["jobs"]["cpu"]["steps"] if "run" in step)
    assert run == ".ci/run"
    script = (REPOSITORY / run).read_text()
    for tool in ("ruff check", "ruff format --check", "mypy", "pytest --benchmark-only", "pytest -n auto -m slow"):
        assert f".venv/bin/{tool}" in script


def test_a_failing_gate_fails_its_step():
    """GitHub's default shell has no pipefail, and the gate is piped."""
    assert WORKFLOW["jobs"]["gpu"]["defaults"]["run"]["shell"] == "bash"


@pytest.mark.parametrize("needed", ["schedule", "workflow_dispatch", "'gpu'"])
def test_gpu_job_runs_nightly_by_hand_or_by_label(needed):
    assert needed in WORKFLOW["jobs"]["gpu"]["if"]
    assert re.search(r"^  schedule:", (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(), re.MULTILINE)
