"""Settings of endpoints: forms of the option, and messages that never show a secret."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune.endpoint.settings import EndpointSettings, parse_endpoint, read_endpoint
from finetune.recipe.errors import UserError

URL = "http://localhost:8000/v1"
KEY = "sk-secret-0123456789abcdef"


def test_forms_of_the_option(tmp_path: Path) -> None:
    expected = EndpointSettings(url=URL, model="toy", concurrency=2, budget_price=2.5, input_price=1)
    file = tmp_path / "judge.yaml"
    file.write_text(f"url: {URL}/\nmodel: toy\nconcurrency: 2\nbudget_price: 2.5\ninput_price: 1\n")
    pairs = f"url={URL},model=toy,concurrency=2,budget_price=2.5,input_price=1"
    mapping = f"{{url: {URL}, model: toy, concurrency: 2, budget_price: 2.5, input_price: 1}}"
    assert [parse_endpoint(text) for text in (str(file), pairs, mapping)] == [expected] * 3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("missing.yaml", ("no such file: missing.yaml", "FILE.yaml, or url=")),
        ("toy", ("not key=value,key=value",)),
        (f"url={URL}", ("--endpoint.model: missing",)),
        (f"url={URL},model=toy,concurency=2", ("unknown key", "did you mean 'concurrency'?")),
        (
            f"url={URL}/chat/completions,model=toy",
            ("ends with /chat/completions", "delete /chat/completions"),
        ),
        ("url=localhost:8000,model=toy", ("not the base URL of an API",)),
        ("url=http://localhost:80000/v1,model=toy", ("not the base URL of an API",)),
        (f"url={URL},model=toy,budget_price=1", ("budget_price without prices",)),
        (
            f"url={URL},model=toy,concurrency=0",
            ("--endpoint.concurrency: found 0", "an integer from 1 to 256"),
        ),
    ],
)
def test_errors_of_the_option(text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        parse_endpoint(text)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"api_key_env": KEY},
        {"api_key_env": KEY.replace("-", "_")},
        {"api_key": KEY},
        {"url": f"https://user:{KEY}@models.example.com/v1"},
        {"url": f"https://models.example.com/v1?key={KEY}"},
    ],
    ids=str,
)
def test_a_secret_in_the_wrong_place_is_not_shown(values: dict[str, str]) -> None:
    settings = {"url": URL, "model": "toy", **values}
    with pytest.raises(UserError) as caught:
        read_endpoint(settings)
    assert KEY[3:] not in str(caught.value) and KEY.replace("-", "_") not in str(caught.value)
    assert caught.value.__suppress_context__
    with pytest.raises(ValidationError) as direct:
        EndpointSettings(**settings)
    assert KEY not in str(direct.value)
