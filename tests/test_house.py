"""The rooms of the house: which imports which, how full one may be, what is documented."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The rooms of each package, from the foundation up: a room imports only rooms that stand before it.
ROOMS = {
    "moco_common": (
        *("version", "text", "errors", "dependencies", "comm", "hardware", "files", "figures"),
        *("images", "config", "progress", "html_page", "reader", "backbone", "sync_batch_norm"),
        *("stopping", "run_lock", "launch"),
    ),
    "pretrain": (
        *("losses", "distributed", "profiling", "modeling", "data", "solver", "checkpoint"),
        *("methods", "config", "probe", "visualization", "doctor", "engine", "inspection"),
        "gpu_check",
        "api",
    ),
    "moco_det": (
        *("registration", "structures", "config", "conversion", "modeling", "checkpoint"),
        *("data", "evaluation", "visualization", "inference", "engine", "report", "survey"),
        *("demo", "export", "api"),
    ),
}
PACKAGES = tuple(ROOMS)
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FULLEST_ROOM, LONGEST_FILE, LONGEST_TOOL = 16, 600, 90  # files, lines, lines


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
    [
        ("moco_common", ("pretrain", "moco_det", "detectron2", "fvcore")),
        ("pretrain", ("moco_det", "detectron2")),
        ("moco_det", ("pretrain",)),
    ],
)
def test_the_packages_know_nothing_of_each_other(package, forbidden):
    for path in (ROOT / package).rglob("*.py"):
        found = {name.split(".")[0] for name in imports(path)}
        assert not found & set(forbidden), path


def rooms_above(package, sources, rooms):
    """``(module, what it imports)`` for each import that does not run down the list of rooms."""
    order = {f"{package}.{room}": height for height, room in enumerate(rooms)}

    def height(module):
        return order[".".join(module.split(".")[:2])]

    for module, imported in sources.items():
        for name in imported:
            inside = name.startswith(f"{package}.") and name.count(".") and module != package
            if inside and ".".join(name.split(".")[:2]) in order:
                same = name.split(".")[1] == module.split(".")[1]
                if not same and height(name) >= height(module):
                    yield module, name


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_imports_only_rooms_below_it(package):
    sources = {name_of(path): set(imports(path)) for path in (ROOT / package).rglob("*.py")}
    rooms = {module.split(".")[1] for module in sources if module != package}
    assert rooms == set(ROOMS[package])
    assert not list(rooms_above(package, sources, ROOMS[package]))


def test_an_arrow_that_runs_up_is_found():
    sources = {"p.low.a": {"p.high.b"}, "p.high.b": {"p.low.a", "os"}, "p.low.c": {"p.low.a"}}
    assert list(rooms_above("p", sources, ("low", "high"))) == [("p.low.a", "p.high.b")]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_import_each_other_in_a_circle(package):
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


def test_rooms_are_no_corridors_and_tools_thin():
    files = Counter(path.parent for path in MODULES if path.name != "__init__.py")
    assert not {str(folder): count for folder, count in files.items() if count > FULLEST_ROOM}
    long = {
        str(path.relative_to(ROOT)): lines
        for path in [*MODULES, *(ROOT / "tools").glob("*.py")]
        if (lines := len(path.read_text(encoding="utf-8").splitlines()))
        > (LONGEST_TOOL if path.parent.name == "tools" else LONGEST_FILE)
    }
    assert not long


def test_nothing_unpickles_freely():
    # Bytes that the run pickled itself, in memory or in a file without a name.
    own = ROOT / "moco_det/data/catalog.py"
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads") or path == own, path
            # np.load executes nothing unless it is told to.
            assert not any(k.arg == "allow_pickle" for k in node.keywords), path


def test_files_of_tensors_are_read_by_the_reader_alone():
    for path in [*MODULES, *(ROOT / "tools").glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        called = {
            ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)
        }
        assert not called & {"torch.load", "torch.jit.load", "load_file", "pickle.Unpickler"}, path
        if path.parent.name != "reader":
            assert not called & {"safe_open", "safetensors.torch.load_file"}, path
            assert "_Unpickler" not in source, path


def test_pictures_are_opened_in_one_place_alone():
    for path in [*MODULES, *(ROOT / "tools").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        ends = {name.rpartition(".")[2] for name in called}
        assert not ends & {"read_image", "imread"}, path
        assert "Image.open" not in called or name_of(path) == "moco_common.images", path
        # Detectron2's mapper reads pictures by itself; `CheckedMapper` looks at them first.
        assert "DatasetMapper" not in called, path


def test_no_backend_and_no_device_is_named_outside_the_launchers():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert ".cuda()" not in text, path
        if path.stem != "launch" and path.parent.name != "doctor":
            assert '"nccl"' not in text.lower(), path
            assert '"gloo"' not in text, path
