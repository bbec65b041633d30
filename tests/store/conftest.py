"""One etcd cluster for all tests of the store that leave it whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.store.etcd_cluster import ETCD, SKIP_REASON, EtcdCluster, cluster


@pytest.fixture(scope="session")
def etcd() -> Iterator[EtcdCluster]:
    """Three members. A test that harms one of them brings it back itself (`EtcdCluster.mend`)."""
    if ETCD is None:
        pytest.skip(SKIP_REASON)
    with cluster(3) as made:
        yield made
