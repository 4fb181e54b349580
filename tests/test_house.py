"""The house as it should stand: who imports whom, how large a room may be, what is documented."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pretrain", "moco_det")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LONGEST_ROOM, LONGEST_TOOL = 310, 85  # lines


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Modules that a file imports, wherever in it the import stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("pretrain", ("moco_det", "detectron2")), ("moco_det", ("pretrain",))],
)
def test_the_packages_know_nothing_of_each_other(package, forbidden):
    for path in (ROOT / package).rglob("*.py"):
        found = {name.split(".")[0] for name in imports(path)}
        assert not found & set(forbidden), path


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_each_other_in_one_direction(package):
    modules = {name_of(path): path for path in (ROOT / package).rglob("*.py")}
    graph = {
        name: {m for m in imports(path) if m in modules and m != name}
        for name, path in modules.items()
        # A package's front door imports what is behind it; nothing behind it may need the door.
        if path.name != "__init__.py" or name.count(".")
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in graph:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(path.pop())

    for name in sorted(graph):
        visit(name)


def undocumented(source):
    """Public names without a docstring: the module, its functions and classes, and methods of
    classes that inherit nothing (an override does what its base says)."""
    tree = ast.parse(source)
    if tree.body and not ast.get_docstring(tree):
        yield "the module itself"
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    for node in public:
        if not ast.get_docstring(node):
            yield node.name
        own = isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases}
        if own is not False and own <= {"Exception", "NamedTuple", "Protocol"}:
            for method in node.body:
                named = isinstance(method, kinds) and not method.name.startswith("_")
                stub = named and ast.unparse(method.body[-1]) == "..."
                if named and not stub and not ast.get_docstring(method):
                    yield f"{node.name}.{method.name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_public_name_has_a_docstring(path):
    assert not list(undocumented(path.read_text(encoding="utf-8")))


def test_a_missing_docstring_is_found_wherever_one_is_due():
    source = """
def documented(): "what it does"
def bare(): return 1
def _private(): return 1
class Own:
    "what it is"
    def bare(self): return 1
    def stub(self): ...
    def _private(self): return 1
class Derived(Own):
    "what it is"
    def bare(self): return 2
class Bare: pass
"""
    assert list(undocumented(source)) == ["the module itself", "bare", "Own.bare", "Bare"]
    assert list(undocumented("")) == []


def test_rooms_stay_small_and_tools_thin():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in [*MODULES, *(ROOT / "tools").glob("*.py")]
        if (lines := len(path.read_text(encoding="utf-8").splitlines()))
        > (LONGEST_TOOL if path.parent.name == "tools" else LONGEST_ROOM)
    }
    assert not long


def test_nothing_unpickles_freely():
    # Bytes that the module has just pickled itself, in memory.
    own = [ROOT / "moco_det" / name for name in ("datasets.py", "semantic_data.py")]
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads") or path in own, path
            # np.load executes nothing unless it is told to.
            assert not any(k.arg == "allow_pickle" for k in node.keywords), path
            if called == "torch.load":
                safe = any(
                    k.arg == "weights_only" and ast.unparse(k.value) == "True"
                    for k in node.keywords
                )
                assert safe, f"{path}:{node.lineno}"


def test_no_backend_and_no_device_is_named_outside_the_launchers():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert ".cuda()" not in text, path
        if path.stem not in ("launch", "processes", "doctor"):
            assert '"nccl"' not in text.lower(), path
            assert '"gloo"' not in text, path
