"""A random base and data for cells of the compatibility matrix."""

import pytest
from matrix_runs import CellFiles, make_cell_files


@pytest.fixture(scope="session")
def cell_files(tmp_path_factory: pytest.TempPathFactory) -> CellFiles:
    """Return a folder with a base and data."""
    return make_cell_files(tmp_path_factory.mktemp("cells"))
