"""The property matrix: every adapter, every property, three families; the docs are up to date."""

import adapter_docs
import pytest
from adapter_matrix import cell
from adapter_properties import FAMILIES, METHODS, PROPERTIES

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", list(PROPERTIES))  # the fastest: a cell is trained once for all of them
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_property(name, method, family):
    reason = cell(name, method, family)
    assert reason is None or len(reason) > 20


def test_the_page_on_adapters_is_up_to_date():
    assert adapter_docs.PAGE.read_text(encoding="utf-8") == adapter_docs.render()
