"""Makes the tests of timing.pytest_cases: one for each case and provider."""

import pytest


def pytest_generate_tests(metafunc):
    if cases := getattr(metafunc.function, "cases", None):
        params = [
            pytest.param(case, name, id=f"{case.shape}-{name}")
            for case in cases()
            for name in case.providers
        ]
        metafunc.parametrize(("case", "provider"), params)
