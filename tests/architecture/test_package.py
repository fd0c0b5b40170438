"""The package as it is shipped: what loading it costs, what travels in the wheel, and that it works from there."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LIGHT = {
    "import": "import mmbridge",
    "settings": "import mmbridge.config, mmbridge.hub, mmbridge.messages",
    "help": "commands = [[], *([name] for name in COMMANDS)]\nfor words in commands: run([*words, '--help'])",
    "ls": "run(['ls'])",
    "recipe": "from mmbridge.config import Recipe; Recipe.load('tiny/encoder_alignment')",
}
SCRIPT = """
import sys
from mmbridge.cli.main import COMMANDS, main

def run(arguments):
    try:
        main(arguments)
    except SystemExit:
        pass

{action}
heavy = ["torch", "numpy", "transformers", "diffusers", "lightning", "peft", "timm", "open_clip"]
print("loaded:", [name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("action", LIGHT.values(), ids=LIGHT.keys())
def test_light_actions_load_no_torch(action):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(action=action)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    """The wheel, unpacked; built offline from a copy, so that nothing left from earlier builds gets in."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "recipes", "checkpoints"):
        shutil.copytree(root / name, copy / name, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(copy)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = out.glob("mmbridge-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def files_below(folder: Path, *patterns: str) -> set[str]:
    found = {file.relative_to(folder).as_posix() for pattern in patterns for file in folder.rglob(pattern)}
    return {name for name in found if "__pycache__" not in name and ".egg-info" not in name}


def test_wheel_holds_code_recipes_templates_and_weights(wheel, root):
    package = root / "src" / "mmbridge"
    shipped = wheel / "mmbridge"
    wanted = files_below(package, "*.py", "*.jinja", "*.css", "py.typed")
    wanted |= {f"recipes/{name}" for name in files_below(root / "recipes", "*.py", "*.yaml")}
    weights = files_below(root / "checkpoints", "*.py", "*.json", "*.safetensors", "*.md", "*.txt", "*.model")
    wanted |= {f"checkpoints/{name}" for name in weights}
    assert {file.relative_to(shipped).as_posix() for file in shipped.rglob("*") if file.is_file()} == wanted
    assert {"py.typed", "templates/plain.jinja", "recipes/tiny/encoder_alignment.yaml"} <= wanted
    (info,) = wheel.glob("*.dist-info")
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()
    assert "mmbridge = mmbridge.cli.main:main" in (info / "entry_points.txt").read_text()


def test_shipped_weights_are_small(root):
    weights = sum(file.stat().st_size for file in (root / "checkpoints").rglob("*.safetensors"))
    assert weights <= 60e6


def test_wheel_works_in_an_empty_folder(wheel, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(wheel)}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    script = "import mmbridge; from mmbridge import hub; print(mmbridge.__file__, hub.package_folder('recipes'))"
    assert run("-c", script).split() == [str(wheel / "mmbridge" / "__init__.py"), str(wheel / "mmbridge" / "recipes")]
    assert "tiny/encoder_alignment" in run("-m", "mmbridge", "ls", "recipes")
    assert run("-m", "mmbridge", "cp", "tiny/encoder_alignment", "mine.yaml") == "mine.yaml\n"


def test_continuous_integration_runs_the_suite(root):
    assert os.access(root / ".ci" / "run", os.X_OK)
    assert "make test" in (root / ".ci" / "run").read_text().splitlines()
    dry = subprocess.run(["make", "--dry-run", "test"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert [word for word in ("ruff check", "mypy", "pytest -n 2") if word not in dry] == []


def test_nothing_names_a_folder_of_somebody_machine(root):
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    home = re.compile(rb"(?<![\w.~])/(home|root|Users|work)/[\w.]")
    found = []
    for name in filter(None, listed):
        file = root / name
        if file.suffix in (".safetensors", ".png", ".wav", ".mp4") or not file.is_file():
            continue
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            if home.search(line):
                found.append(f"{name}:{number}")
    assert not found
