"""A random base and data for cells of the compatibility matrix."""

import pytest
from cells import World, make_world


@pytest.fixture(scope="session")
def cell_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return a folder with a base and data."""
    return make_world(tmp_path_factory.mktemp("cells"))
