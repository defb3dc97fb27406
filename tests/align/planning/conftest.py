"""The random base and the rows that cells of the compatibility matrix run on."""

import pytest
from cells import World, make_world


@pytest.fixture(scope="session")
def cell_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return a folder with a base and rows."""
    return make_world(tmp_path_factory.mktemp("cells"))
