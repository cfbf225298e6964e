"""Stand-ins that several test files share."""


class Rounds:
    """pytest-benchmark's fixture reduced to its rounds: the same calls in the same order, nothing recorded."""

    enabled, has_error = True, False

    def pedantic(self, target, setup, teardown, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            setup()
            target()
            teardown()
