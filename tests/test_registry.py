"""Registries: parts are found without being imported, checked before being built, and refused in clear words."""

import sys

import pytest

import mmbridge
import mmbridge.registry
from mmbridge.errors import ConfigError
from mmbridge.registry import Registry, Table, suggest

FILE = """\
from mmbridge.registry import gadgets

register = gadgets.register


@register("bell", tiny={"size": 1})
class Bell:
    def __init__(self, size: int, tone: str = "low"):
        self.size, self.tone = size, tone


@register("horn")
def create_horn(size: int = 2, **more: int):
    return (size, more)
"""


@pytest.fixture
def gadgets(tmp_path, monkeypatch):
    """A registry for parts of a folder of this test's own."""
    folder = tmp_path / "gadgets"
    folder.mkdir()
    (folder / "loud.py").write_text(FILE)
    registry = Registry("gadget")
    registry.folder = folder
    monkeypatch.setattr(mmbridge.registry, "gadgets", registry, raising=False)
    monkeypatch.setattr(mmbridge, "__path__", [*mmbridge.__path__, str(tmp_path)])
    yield registry
    for name in [name for name in sys.modules if name.startswith("mmbridge.gadgets")]:
        del sys.modules[name]


def test_parts_are_listed_without_importing_them(gadgets):
    assert gadgets.names() == ["bell", "horn"]
    assert gadgets.names("b*") == ["bell"]
    assert "mmbridge.gadgets.loud" not in sys.modules
    assert gadgets.get("bell").__name__ == "Bell"
    assert "mmbridge.gadgets.loud" in sys.modules


def test_parts_are_built_and_remember_what_from(gadgets):
    bell = gadgets.create("bell", size=3)
    assert (bell.size, bell.tone) == (3, "low")
    assert bell.arguments == {"size": 3}
    assert bell.registry_name == "bell"
    assert gadgets.get("bell")(5, tone="high").arguments == {"size": 5, "tone": "high"}
    assert gadgets.create("horn", size=1, weight=4) == (1, {"weight": 4})
    assert (gadgets.tiny("bell"), gadgets.tiny("horn")) == ({"size": 1}, None)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bel", {}, r"unknown gadget 'bel'; did you mean 'bell'\?"),
        ("zzz", {}, r"unknown gadget 'zzz'; known: bell, horn\."),
        ("bell", {"sise": 1}, r"gadget 'bell' has no argument 'sise'; did you mean 'size'\?"),
        ("bell", {"tone": "low"}, r"gadget 'bell' needs the argument 'size'; add it"),
    ],
)
def test_unknown_names_and_arguments_are_refused(gadgets, name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        gadgets.create(name, **arguments)


def test_two_files_with_one_name_are_refused(gadgets):
    (gadgets.folder / "quiet.py").write_text(FILE)
    with pytest.raises(
        ConfigError, match=r"'bell' is registered in mmbridge\.gadgets\.loud and mmbridge\.gadgets\.quiet"
    ):
        gadgets.names()


def test_a_name_is_not_taken_twice(gadgets):
    gadgets.get("bell")

    class Bell:
        pass

    with pytest.raises(
        ConfigError, match=r"gadget 'bell' is registered by mmbridge\.gadgets\.loud\.Bell and .*rename one"
    ):
        gadgets.register("bell")(Bell)


def test_other_packages_add_parts_by_entry_points(gadgets, tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "orchestra-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: orchestra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmbridge.gadgets]\ndrum = orchestra\n")
    (site / "orchestra.py").write_text(
        "from mmbridge.registry import gadgets\n\n\n@gadgets.register('drum')\ndef drum():\n    return 'boom'\n"
    )
    monkeypatch.syspath_prepend(site)
    assert gadgets.names() == ["bell", "drum", "horn"]
    assert gadgets.create("drum") == "boom"


def test_suggestions_are_few_and_close():
    assert suggest("colur", ["colour", "shape"]) == "; did you mean 'colour'?"
    assert suggest("x", ["colour", "shape"]) == "; known: colour, shape."
    assert suggest("aa", ["aab", "aac", "aad", "aae"]).count("'") == 6


class Whistle:
    """Something that a table may hold."""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table whose own module is "low_tones", beside another package's "high_tones", found by its entry point."""
    (tmp_path / "low_tones.py").write_text("import test_tables\ntest_tables.TONES.register('low', object)\n")
    (tmp_path / "high_tones.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "mute_tones.py").touch()
    facts = tmp_path / "tones-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tones\nVersion: 1.0\n")
    names = "[test.tones]\nhigh = high_tones\nmute = mute_tones\nlow = high_tones\n"
    (facts / "entry_points.txt").write_text(names)
    monkeypatch.syspath_prepend(tmp_path)
    made = Table("tone", "test.tones", {"low": "low_tones"})
    module = type(sys)("test_tables")
    module.TONES = made
    monkeypatch.setitem(sys.modules, "test_tables", module)
    yield made
    for name in ("low_tones", "high_tones", "mute_tones"):
        sys.modules.pop(name, None)


def test_a_table_knows_names_without_importing_modules(table):
    table.register("middle", Whistle)
    assert list(table) == ["low", "high", "mute", "middle"] and len(table) == 4
    assert "high" in table and "shrill" not in table
    assert "low_tones" not in sys.modules and "high_tones" not in sys.modules


def test_a_table_imports_the_module_of_the_name_that_is_looked_up(table):
    assert table["low"] is object  # its own, though another package names one so too
    with pytest.raises(RuntimeError, match="imported"):
        table["high"]
    with pytest.raises(KeyError):
        table["shrill"]


def test_a_module_that_does_not_register_its_name_is_told(table):
    with pytest.raises(ConfigError, match="mute_tones registers no tone 'mute', as the entry point in test.tones says"):
        table["mute"]


def test_a_name_of_a_table_is_taken_once(table):
    table.register("middle", Whistle)
    table.register("middle", Whistle)  # a module that is read again
    with pytest.raises(ConfigError, match="tone 'middle' is registered by .*Whistle and builtins.object; rename one"):
        table.register("middle", object)
