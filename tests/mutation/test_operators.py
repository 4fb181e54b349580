"""Which changes the mutation operators make, and that the tables beside them are complete."""

import ast

import pytest

from tests.mutation.__main__ import ROOT, load_yaml
from tests.mutation.operators import mutants

TABLE = load_yaml("modules.yaml")


def changes(line):
    """The mutated lines of a function of one line."""
    found = list(mutants(f"def f(a, b):\n    {line}\n"))
    assert all(mutant.function == "f" and mutant.lines == (2, 2) for mutant in found)
    return {mutant.after for mutant in found}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("c = a < b", {"c = a <= b"}),
        ("c = a >= b", {"c = a > b"}),
        ("c = a == b", {"c = a != b"}),
        ("c = a is not b", {"c = a is b"}),
        ("c = a in b", {"c = a not in b"}),
        ("c = a < b < a", {"c = a <= b < a", "c = a < b <= a"}),
        ("c = a and b", {"c = a or b"}),
        ("c = not a", {"c = a"}),
        ("c = -a", {"c = a"}),
        ("c = a + b * a", {"c = a - b * a", "c = a + b / a"}),
        ("c = a // b", {"c = a * b"}),
        ("c = a & b", {"c = a | b"}),
        ("c = 3", {"c = 4", "c = 2"}),
        ("c = True", {"c = False"}),
        ("a += b", {"pass", "a -= b"}),
        ("return a", {"return None"}),
        ("return None", set()),
        ("a.append(b)", {"pass"}),
        ("c = a(b, x=a, y=b)", {"c = a(b, y=b)", "c = a(b, x=a)"}),
        ("c = a(**b)", set()),
        ("c = a(device=b)", set()),
        ("c = 'text' + a", set()),
        ("c = f'{a + b}'", set()),
        ("c: a + b = a", set()),
        ("'A docstring: 1 + 1.'", set()),
    ],
)
def test_each_operator_makes_one_small_change(line, expected):
    assert changes(line) == expected


def test_a_mutant_names_its_function_and_the_lines_of_its_statement():
    source = "class A:\n  def f(self, x):\n    if (\n      x > 0\n    ):\n      g()\n"
    found = [(m.function, m.lines, m.before, m.after) for m in mutants(source)]
    assert found == [
        ("A.f", (3, 5), "if x > 0:", "if x >= 0:"),
        ("A.f", (3, 5), "if x > 0:", "if x > 1:"),
        ("A.f", (3, 5), "if x > 0:", "if x > -1:"),
        ("A.f", (6, 6), "g()", "pass"),
    ]


def test_a_long_line_is_cut_around_the_change():
    (mutant,) = mutants(f"x = f({'a, ' * 100}b < c, {'d, ' * 100})")
    assert mutant.before.startswith("...a, a,")
    assert "b < c" in mutant.before
    assert "b <= c" in mutant.after
    assert len(mutant.before) < 140


@pytest.mark.parametrize("module", TABLE)
def test_tests_of_the_table_exist_and_its_mutants_are_valid(module):
    assert all((ROOT / word).exists() for word in TABLE[module] if word.startswith("tests/"))
    source = (ROOT / module).read_text(encoding="utf-8")
    original = ast.unparse(ast.parse(source))
    found = list(mutants(source))
    assert found
    for mutant in found:
        assert ast.unparse(ast.parse(mutant.source)) != original, mutant.key
        assert mutant.before != mutant.after


def test_every_equivalent_mutant_has_a_module_and_a_reason():
    listed = load_yaml("equivalent.yaml")
    assert listed.keys() <= TABLE.keys()
    assert all(entry["reason"] for entries in listed.values() for entry in entries)
