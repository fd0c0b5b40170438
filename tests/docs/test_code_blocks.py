"""Examples in README.md and docs/ run as written: Python in order per page, command lines through the parser."""

import os
import re

import pytest
from architecture.test_layers import LAYERS
from doc_pages import PAGES, ROOT, blocks_of, commands_of, name_of

from mmbridge.cli.main import parse_arguments
from mmbridge.config import Recipe, recipe_names

NOT_RUN = "not run: "
# Its blocks are files of a project and code that needs them; test_extending.py runs them all, in a copy of the project.
ELSEWHERE = ROOT / "docs" / "extending.md"

RUN = [page for page in PAGES if page != ELSEWHERE and any(block.language == "python" for block in blocks_of(page))]
COMMANDS = [(page, words) for page in PAGES for words in commands_of(page)]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            code = block.code
            if not block.mark.startswith(NOT_RUN):
                exec(code, names)


def test_only_what_needs_large_weights_is_not_run():
    marks = {block.mark for page in PAGES for block in blocks_of(page) if block.mark.startswith(NOT_RUN)}
    assert marks <= {"not run: needs 7B weights"}


@pytest.mark.parametrize(
    "page, words", COMMANDS, ids=[f"{name_of(page)}: {' '.join(words)}" for page, words in COMMANDS]
)
def test_command_lines_parse(page, words):
    if {"--help", "--version"} & set(words):
        with pytest.raises(SystemExit) as done:
            parse_arguments(words)
        assert done.value.code == 0
        return
    parsed = parse_arguments(words)
    if getattr(parsed, "recipe", None) in recipe_names():
        Recipe.load(parsed.recipe, getattr(parsed, "overrides", []))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert os.path.exists(page.parent / target), f"{name_of(page)} links to {target}, which is not there"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_design_has_the_layers_that_are_enforced():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| (`[^|]+) \|", page, re.MULTILINE)
    layers = tuple({name.removesuffix("/").removesuffix(".py") for name in re.findall("`(.+?)`", row)} for row in rows)
    assert layers == LAYERS
