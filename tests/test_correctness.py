"""Every implementation on every workload, outputs and gradients: right by the float64 oracle, and close to torch SDPA.

And what it takes an option to mean, as far as it would be asked before its first timing.
"""

import pytest

from attn_impls.harness import probes

pytestmark = pytest.mark.correctness


def test_oracle(case, suite, problem):
    if failure := suite.verdict(case, problem).failure:
        pytest.fail(f"{case.implementation.name} {failure}", pytrace=False)


def test_allclose_to_sdpa(case, suite, problem):
    if failure := suite.verdict(case, problem).sdpa_failure:
        pytest.fail(f"{case.implementation.name} {failure}", pytrace=False)


@pytest.mark.direction("backward")
def test_gradients_oracle(case, suite, problem):
    if failure := suite.verdict(case, problem).failure:
        pytest.fail(f"{case.implementation.name} {failure}", pytrace=False)


@pytest.mark.direction("backward")
def test_gradients_allclose_to_sdpa(case, suite, problem):
    if failure := suite.verdict(case, problem).sdpa_failure:
        pytest.fail(f"{case.implementation.name} {failure}", pytrace=False)


@pytest.mark.rare
def test_rare_oracle(case, suite, problem):
    if failure := suite.verdict(case, problem).failure:
        pytest.fail(f"{case.implementation.name} {failure}", pytrace=False)


@pytest.mark.rare
@pytest.mark.direction("backward")
def test_rare_gradients_oracle(case, suite, problem):
    if failure := suite.verdict(case, problem).failure:
        pytest.fail(f"{case.implementation.name} {failure}", pytrace=False)


def test_probes(implementation, suite):
    answers = suite.answers(implementation)
    if objection := probes.objection(answers):
        pytest.fail(f"{implementation.name} {objection} ({probes.brief(answers)})", pytrace=False)
    if "ok" not in answers.values():
        pytest.skip(f"{implementation.name}: {probes.brief(answers)}")
