"""The documentation: every command line in it is accepted, and everything that it names exists."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import moco_det.config.defaults
import moco_det.config.protocols
import pretrain.config.defaults
from tests.test_house import ROOMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = {path.stem for path in (ROOT / "tools").glob("[a-z]*.py")}
COMMAND = re.compile(r"^(?:\S*python3? )?(?:tools/(\w+)\.py|moco-(?!det )([a-z-]+)) ?(.*)$")


def commands(page):
    """The ``(tool, words)`` of every command line of a page, indented or fenced, with continuation
    lines joined and the page's shell variables replaced."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    variables = dict(re.findall(r'^    ([A-Z0-9]+)="([^"]*)"', text, flags=re.MULTILINE))
    for line in text.splitlines():
        if not line.startswith("    ") and not line.startswith(("tools/", "moco-")):
            continue
        found = COMMAND.match(line.strip().removeprefix("$ "))
        if found:
            tool = found.group(1) or found.group(2).replace("-", "_")
            tool = f"{tool}_run" if f"{tool}_run" in TOOLS else tool  # moco-inspect
            line = re.sub(r"\$([A-Z0-9]+)", lambda m: variables[m.group(1)], found.group(3))
            yield tool, shlex.split(line, comments=True)


EVERY = [
    pytest.param(tool, words, id=f"{page.stem}-{i}-{tool}")
    for page in PAGES
    for i, (tool, words) in enumerate(commands(page))
]


def placeholder(word):
    return bool(re.fullmatch(r"\[.*|.*\]|\.\.\.|<.*>", word)) or any(
        name in word for name in ("NAME|FILE", "RECIPE", "CHECKPOINT", "SPEC")
    )


@pytest.mark.parametrize(("tool", "words"), EVERY)
def test_a_documented_command_line_is_accepted(tool, words):
    """Flags exist, the recipe or protocol exists, and every KEY VALUE fits it."""
    assert tool in TOOLS, tool
    source = (ROOT / "tools" / f"{tool}.py").read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{tool} has no {word}"
    if any(placeholder(word) for word in words) or "--config" not in words:
        return
    config = words[words.index("--config") + 1]
    if config.endswith(".yaml"):
        return
    first = next(
        (i for i, w in enumerate(words) if re.fullmatch(r"[A-Z_]+(\.[A-Z0-9_]+)+|SEED", w)),
        len(words),
    )
    overrides = words[first:]
    load = (
        pretrain.config.defaults.load_config
        if tool == "pretrain"
        else moco_det.config.protocols.load_config
    )
    load(config, [word for word in overrides if not word.startswith("--")])


def test_there_are_commands_to_check():
    assert len(EVERY) > 20


@pytest.mark.parametrize("name", moco_det.config.protocols.protocol_names())
def test_every_protocol_is_documented(name):
    text = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    family = re.sub(r"(12k|1x|2x)", "", name)
    listed = {re.sub(r"(12k|1x|2x)", "", found) for found in re.findall(r"`([A-Za-z0-9-]+)`", text)}
    assert family in listed or name == "scenes"


@pytest.mark.parametrize("name", pretrain.config.defaults.recipe_names())
def test_every_recipe_is_documented(name):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"`{name}`" in text or name == "scenes"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_key_that_a_page_names_exists(page):
    known = {
        *pretrain.config.defaults.leaves(pretrain.config.defaults.get_defaults()),
        *moco_det.config.defaults.flatten(moco_det.config.defaults.default_config()),
    }
    sections = {key.partition(".")[0] for key in known if "." in key}
    named = re.findall(r"`([A-Z]+)\.([A-Z0-9_.]*[A-Z0-9])", page.read_text(encoding="utf-8"))
    for section, rest in named:
        key = f"{section}.{rest}"
        part = any(name.startswith(f"{key}.") for name in known)  # `MODEL.RESNETS.*`
        assert section not in sections or key in known or part, key


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for target, anchor in links:
        assert not target or (page.parent / target).exists(), target
        if anchor:
            assert anchor in anchors(page.parent / target if target else page), (target, anchor)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_of_ours_that_a_page_names_exists(page):
    """Except in the page that shows how to create a method's file."""
    ours = r"`((?:moco_common|pretrain|moco_det|tests/(?:moco_common|pretrain|moco_det))/[\w/.]+)"
    for name in re.findall(ours, page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or page.stem == "adding-a-method", name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_target_of_make_that_a_page_names_exists(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^    |`)make ([\w-]+)", page.read_text("utf-8"), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert not {name for name in pages if f"({name})" not in index}


@pytest.mark.parametrize("package", ROOMS)
def test_contributing_describes_every_room(package):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index(f"| `{package}` | purpose |") :].partition("\n\n")[0]
    described = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)))
    assert not set(ROOMS[package]) - set(described)


def test_every_module_that_the_changelog_points_to_exists():
    table = re.findall(r"^\| `.*?\| (.*) \|$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    modules = [name for row in table for name in re.findall(r"`([\w.]+)`", row)]
    assert len(modules) > 40
    assert not [name for name in modules if importlib.util.find_spec(name) is None]
