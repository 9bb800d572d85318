"""The number of examples of property tests: fewer in `make test`, all in `make test-all`."""

from hypothesis import HealthCheck, settings

FULL = 100  # the default number of examples

# A busy machine must not fail a test: no time limits.
settings.register_profile("full", max_examples=FULL, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("full"), max_examples=FULL // 5)


def examples(most: int, derandomize: bool = False) -> settings:
    """Settings of a property test: `most` examples in the profile `full`, a share of them in `quick`."""
    tried = max(1, most * settings().max_examples // FULL)
    return settings(max_examples=tried, derandomize=derandomize)
