"""docs/extending.md does what it says: its files go into a copy of the project, and nothing else is edited."""

import configparser
import os
import re
import shutil
import subprocess
import sys

import pytest
from doc_pages import ROOT, blocks_of, commands_of

PAGE = ROOT / "docs" / "extending.md"
FILES = {block.mark.removeprefix("file: "): block.text for block in blocks_of(PAGE) if block.mark.startswith("file: ")}
ENCODER = "src/mmbridge/encoders/mel_statistics.py"
TEST = "tests/encoders/test_mel_statistics.py"


def copy_project(folder):
    """Write the package as it is, with its recipes and weights, below a folder."""
    copied = folder / "src" / "mmbridge"
    shutil.copytree(ROOT / "src" / "mmbridge", copied, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("recipes", "checkpoints"):
        (copied / name).symlink_to(ROOT / name, target_is_directory=True)


def install(folder, package, files, setup):
    """Write a package the way pip leaves it: modules and a dist-info folder with its entry points."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    for name, text in files.items():
        (folder / package / name).write_text(text, encoding="utf-8")
    facts = folder / f"{package}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    declared = configparser.ConfigParser()
    declared.read_string(setup)
    lines = [f"[{group}]{names}" for group, names in declared["options.entry_points"].items()]
    (facts / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The package and the encoders' contract tests as they are, and the two files of the page."""
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    contracts = folder / "tests" / "contracts" / "test_encoders.py"
    contracts.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "contracts" / "test_encoders.py", contracts)
    for name in (ENCODER, TEST):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(FILES[name], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The same encoder in a package of its own."""
    folder = tmp_path_factory.mktemp("package")
    install(folder, "my_parts", {"mel_statistics.py": FILES[ENCODER]}, FILES["setup.cfg"])
    return folder


def run(folder, path, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_names_two_files_and_a_recipe_before_the_ninth_modality():
    assert list(FILES)[:4] == [ENCODER, TEST, "mine.yaml", "setup.cfg"]


def test_the_encoder_is_under_the_contract_tests_at_once(project):
    command = next(
        line for block in blocks_of(PAGE) for line in block.text.splitlines() if line.startswith("python -m pytest")
    )
    output = run(project, [project / "src"], *command.split()[1:], "-p", "no:cacheprovider", "-p", "no:xdist")
    passed, skipped = re.search(r"(\d+) passed(?:, (\d+) skipped)?", output).groups()
    contracts = (project / "tests" / "contracts" / "test_encoders.py").read_text(encoding="utf-8").count("\ndef test_")
    assert int(passed) + int(skipped or 0) == contracts + 1
    assert int(passed) >= 9


def test_the_command_line_finds_it_and_recipes_name_it(project):
    (project / "mine.yaml").write_text(FILES["mine.yaml"], encoding="utf-8")
    outputs = [run(project, [project / "src"], "-m", "mmbridge", *words) for words in commands_of(PAGE)[:3]]
    listed, overridden, own = outputs
    assert listed.split(maxsplit=1) == [
        "mel_statistics",
        "Describe a sound by the mean and the standard deviation of each mel band.\n",
    ]
    assert overridden.startswith("OK") and "mel_statistics" in overridden
    assert own.startswith("OK mine.yaml")


def test_a_bridge_trains_with_it(project):
    code = "\n".join(block.text for block in blocks_of(PAGE) if block.language == "python" and not block.mark)
    run(project, [project / "src"], "-c", code)


def test_another_package_can_bring_it(project, package):
    path = [package, ROOT / "src"]
    code = "from mmbridge.registry import encoders; print(encoders.create('mel_statistics').spec)"
    assert run(package, path, "-c", code) == "TokenSpec(tokens=8, dim=128)\n"
    assert "mel_statistics" in run(package, path, "-m", "mmbridge", "ls", "encoders")
    assert not (ROOT / ENCODER).exists()
