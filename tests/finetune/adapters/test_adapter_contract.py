"""The property matrix: every adapter, every property, three families; the docs hold what it says."""

import pytest
from adapter_properties import FAMILIES, METHODS, PROPERTIES, cell

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(PROPERTIES))
def test_property(name, method, family):
    reason = cell(name, method, family)
    assert reason is None or len(reason) > 20
