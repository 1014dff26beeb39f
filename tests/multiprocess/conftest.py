"""Shared by the multi-process tests: the one pool of ranks."""

from collections.abc import Iterator

import pytest

from tests.multiprocess.rank_pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Up to 8 ranks; see RankPool.run()."""
    pool = RankPool(8)
    yield pool
    pool.close()
