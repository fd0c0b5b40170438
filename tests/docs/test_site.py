"""The site's configuration holds together: every page is in it once, links and anchors resolve, the reference is whole."""

import importlib
import re
from pathlib import Path

import pytest
import yaml
from doc_pages import PAGES, ROOT, name_of

DOCS = ROOT / "docs"
SITE = [page for page in PAGES if page.is_relative_to(DOCS)]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PUBLIC = (
    "mmbridge", "mmbridge.media", "mmbridge.encoders", "mmbridge.projections", "mmbridge.backbones", "mmbridge.decoders",
    "mmbridge.inputs", "mmbridge.outputs", "mmbridge.data", "mmbridge.training", "mmbridge.evaluation", "mmbridge.planning",
    "mmbridge.synthetic",
)  # fmt: skip


def pages_of(entries) -> list[str]:
    """The pages that a part of the navigation names, in order."""
    found = []
    for entry in entries:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += [target] if isinstance(target, str) else pages_of(target)
    return found


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors_of(page: Path) -> set[str]:
    """The anchors that a page's headings get, on the site and on code hosts alike."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def identifiers_of(page: Path) -> list[str]:
    return re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def find(identifier: str):
    """The object that a reference page names."""
    module, _, name = identifier.rpartition(".")
    try:
        return importlib.import_module(identifier)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


def test_every_page_is_in_the_navigation_once():
    assert sorted(pages_of(CONFIG["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in SITE)


def test_the_sections_are_tutorials_guides_concepts_and_reference():
    assert [next(iter(entry)) for entry in CONFIG["nav"]] == [
        "Home", "Tutorials", "How-to guides", "Concepts", "Reference"
    ]  # fmt: skip


@pytest.mark.parametrize("page", SITE, ids=name_of)
def test_links_stay_on_the_site_and_find_their_anchors(page):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file() and linked.is_relative_to(DOCS), f"{target} is not a file below docs/"
        if anchor:
            assert anchor in anchors_of(linked), f"{name_of(linked)} has no heading for #{anchor}"


@pytest.mark.parametrize("page", [page for page in SITE if page.parent.name == "reference"], ids=name_of)
def test_the_reference_names_what_exists_and_is_documented(page):
    identifiers = identifiers_of(page)
    assert identifiers
    for identifier in identifiers:
        assert find(identifier).__doc__


@pytest.mark.parametrize("package", PUBLIC)
def test_the_reference_covers_every_public_name(package):
    page = DOCS / "reference" / f"{package.rpartition('.')[2]}.md"
    module, identifiers = importlib.import_module(package), identifiers_of(page)
    if package not in identifiers:  # named piece by piece
        files = {f"{package}.{file.stem}" for file in Path(module.__path__[0]).glob("*.py")} - {f"{package}.__init__"}
        pieces = {find(identifier) for identifier in identifiers}
        names = [name for name in getattr(module, "__all__", ()) if name not in ("__version__", *modules_of(module))]
        assert {getattr(module, name) for name in names} <= pieces
        assert names or files <= set(identifiers), (
            f"add a line '::: ...' for each of {sorted(files - set(identifiers))}"
        )
        return
    # The site is built without running code, so lazy names must be imported where a type checker sees them.
    source = Path(module.__file__).read_text(encoding="utf-8")
    for name in getattr(module, "__all__", ()):
        assert re.search(rf"import [^#]*?\b{name}\b|^(def|class) {name}\b|^{name}\b[^=]*=", source, re.MULTILINE), name


def modules_of(module) -> tuple[str, ...]:
    return getattr(module, "_MODULES", ())


def test_the_site_asks_no_other_host_for_anything():
    assert CONFIG["theme"]["font"] is False
    for text in (str(CONFIG.get("extra_css")), str(CONFIG.get("extra_javascript")), str(CONFIG["plugins"])):
        assert "://" not in text
