"""What several tests share and is costly to make is made once: a group of tests goes to one process as a whole."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has all tests")
@pytest.mark.xdist_group("any")
def test_groups_are_kept_together(request: pytest.FixtureRequest) -> None:
    """pytest-xdist tells a group by the name of the test, which other versions of pytest do not let it change."""
    assert request.node.nodeid.endswith("@any")
