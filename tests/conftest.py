"""What all tests share: repeatable randomness, and the folder of data sets where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# The same examples on every machine: a failure seen once can be seen again.
settings.register_profile("house", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Compiled code is kept for this run of the tests only, and not at home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECURRA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed():
    # Imported here, so that tests of what needs no torch do not wait for it.
    import torch

    torch.manual_seed(20240711)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The data sets beside the checkout."""
    if not DATA.is_dir():
        pytest.skip("there are no data sets beside the checkout")
    return DATA


def pytest_collection_modifyitems(items):
    if not DATA.is_dir():
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason="there are no data sets beside the checkout"))
