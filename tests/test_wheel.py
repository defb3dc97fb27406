"""The wheel alone: what is in it, and that it runs in an environment that has never seen the checkout."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import __version__

ROOT = Path(__file__).parents[1]
PACKAGES = {"data_templates", "finetune", "align"}
ORIGIN = "import sys, align, finetune; print(align.__file__, finetune.__file__, *sys.path, sep='\\n')"
pytestmark = pytest.mark.slow
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    if importlib.util.find_spec("hatchling") is not None:
        command.append("--no-build-isolation")
    result = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    if "No matching distribution found for hatchling" in result.stderr:
        pytest.skip("hatchling, which builds the wheel, is neither installed nor can it be downloaded")
    assert result.returncode == 0, result.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def call(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Install the wheel into a new environment; return a function that runs it in an empty folder."""
    folder, here = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("here")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    # This environment's libraries, but not its .pth files: that of an editable install names the checkout.
    (packages,) = folder.glob("lib/python*/site-packages")
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "bin" / program), *arguments]
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)

    result = run("python", "-c", ORIGIN)
    assert result.returncode == 0, result.stderr
    *files, _ = lines = result.stdout.splitlines()
    assert all(Path(file).is_relative_to(packages) for file in files[:2]) and str(ROOT) not in lines
    return run


def test_its_content(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"llm_align-{__version__}.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == PACKAGES | {f"llm_align-{__version__}.dist-info"}
    shipped = {file.relative_to(ROOT) for file in (ROOT / "recipes").rglob("*") if file.is_file()}
    assert {f"finetune/shipped/{file}" for file in shipped} <= names and len(shipped) > 60
    assert "finetune/shipped/recipes/tiny/model/model.safetensors" in names
    suffixes = {".py", ".j2", ".typed"}
    sources = [
        file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.suffix in suffixes
    ]
    assert {str(file.relative_to(ROOT)) for file in sources} <= names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {
        "finetune/graders/stories.py",
        "finetune/training/report.html.j2",
        "align/cli/data.html.j2",
    } <= names
    assert "License-Expression: Apache-2.0" in metadata and "Classifier: Typing :: Typed" in metadata
    assert "License ::" not in metadata and "Home-page" not in metadata and "Project-URL" not in metadata


def test_it_answers(call: Call) -> None:
    result = call("llm-align", "--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"llm-align {__version__}\n", "")
    listing = json.loads(call("llm-align", "list", "--json").stdout)
    assert {"sft alpaca", "dpo quickstart"} <= listing["recipes"].keys() and len(listing["adapters"]) == 25
    assert listing["pipelines"].keys() >= {"instructgpt", "zephyr"} and listing["runs"] == {}
    result = call("llm-align", "show", "alpaca")
    assert result.returncode == 0 and result.stdout.startswith("sft alpaca")
    result = call("llm-align", "plan")
    assert result.returncode == 0 and "Fits: " in result.stdout and "llm-align sft" in result.stdout
    # The grader's path is that of the checkout; the wheel has the file elsewhere.
    result = call("llm-align", "dpo", "--dry-run")
    assert result.returncode == 0 and "finetune/graders/stories.py" in result.stdout


def test_it_trains(call: Call) -> None:
    result = call("llm-align", "sft", "train.max_steps=3", "evaluate.exact_match=0")
    assert (result.returncode, result.stderr) == (0, "")
    assert (match := re.search(r"llm-align chat (runs/sft-quickstart-\w{8})", result.stdout))
    program = (
        "import json, pathlib; run = pathlib.Path('{}'); "
        "print(json.dumps([json.loads((run / 'run.json').read_text()), sorted(map(str, run.rglob('*')))]))"
    )
    record, files = json.loads(call("python", "-c", program.format(match[1])).stdout)
    assert (record["status"], record["versions"]["llm-align"]) == ("finished", __version__)
    names = ("adapter/adapter_model.safetensors", "report.html", "metrics.jsonl", "recipe.yaml")
    assert {f"{match[1]}/{name}" for name in names} <= set(files)
    result = call("llm-align", "chat", "sft-quickstart", "--prompt", "Hello", "--max-new-tokens", "4")
    assert (result.returncode, result.stderr) == (0, "")
