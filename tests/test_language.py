"""The language holds: public docstrings have their sections, names are the field's words, not pronouns."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "skysense_jax"
FILES = sorted(
    str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py") if not file.name.startswith("modeling_")
)  # modelling files ship alone, in the words of the code that people will compare them with

PRONOUNS = {
    "mine",
    "theirs",
    "ours",
    "own",
    "one",
    "ones",
    "found",
    "held",
    "given",
    "wanted",
    "there",
    "here",
    "facing",
}
"""Leftovers that say nothing about a value; the field has a word for each."""


def public_functions(file: str) -> list[ast.FunctionDef]:
    """Functions of a module that other files may call, and public methods of its public classes."""
    functions = []
    for node in ast.parse((ROOT / file).read_text()).body:
        body = [node]
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            body = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        functions += [part for part in body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")]
    return functions


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def raises(function: ast.FunctionDef) -> bool:
    """Whether the function's own lines raise a refusal (functions inside of it do not count)."""
    inner = {
        id(node)
        for part in ast.walk(function)
        if part is not function and isinstance(part, ast.FunctionDef)
        for node in ast.walk(part)
    }
    return any(
        isinstance(node, ast.Raise) and node.exc is not None and id(node) not in inner for node in ast.walk(function)
    )


@pytest.mark.parametrize("file", FILES)
def test_public_docstrings_have_their_sections(file):
    """With two parameters or more: Args: names each; a result: Returns:; a refusal of its own: Raises:.

    A function of at most one parameter may say all in its first sentence.
    """
    wrong = []
    for function in public_functions(file):
        text, where = ast.get_docstring(function) or "", f"{file}:{function.lineno}: {function.name}"
        if not text:
            wrong.append(f"{where} has no docstring")
            continue
        names = parameters(function)
        if len(names) >= 2:
            section = text.partition("Args:\n")[2].partition("\n\n")[0]
            if missing := [name for name in names if f"    {name}:" not in section and f", {name}:" not in section]:
                wrong.append(f"{where}: Args: does not name {', '.join(missing)}")
            result = function.returns is not None and ast.unparse(function.returns) not in ("None", "NoReturn")
            if result and "Returns:\n" not in text and "Yields:\n" not in text:
                wrong.append(f"{where}: no Returns:")
        if raises(function) and "Raises" not in text:
            wrong.append(f"{where}: no Raises:")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES)
def test_names_are_no_pronouns(file):
    wrong = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        if name in PRONOUNS:
            wrong.append(f"{file}:{node.lineno}: {name}")
    assert not wrong, "\n".join(wrong)
