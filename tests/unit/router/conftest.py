"""Fixtures that tests of the router share."""

import pytest
from prometheus_client import CollectorRegistry

from prefillshare.kvshare.metrics import Metrics


@pytest.fixture
def metrics():
    """The project's metrics, in their own registry."""
    return Metrics(CollectorRegistry())
