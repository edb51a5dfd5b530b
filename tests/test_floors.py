"""The house holds: imports go down only, files stay readable, nothing unsafe slips in."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "skysense_jax"
FLOORS = {
    "sensors": 0,
    "core": 0,
    "configs": 1,  # lies beside the package in a checkout
    "nn": 1,
    "ops": 1,
    "data": 1,
    "models": 2,
    "objectives": 3,
    "tasks": 3,
    "run": 4,
    "evals": 4,
    "convert": 4,
}  # every other module directly in the package is a command: floor 5
COMMANDS = 5
SAME_FLOOR = {("nn", "ops")}  # a layer may need a pure function
SHIPS_ALONE = {"convert/modeling_skysense.py", "convert/modeling_msgfm.py"}  # plain torch, no import of ours


def room(path: pathlib.PurePath) -> str:
    return path.parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> list[tuple[str, int]]:
    """Rooms of this package that a file imports, with the line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "skysense_jax" and len(parts) > 1:
                found.append((parts[1], node.lineno))
    return found


def sources() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_imports_go_down_only():
    wrong = []
    for file in sources():
        path = file.relative_to(PACKAGE)
        here = room(path)
        if here == "__init__":
            continue
        floor = FLOORS.get(here, COMMANDS)
        for target, line in imported_rooms(ast.parse(file.read_text(), str(file))):
            if target == here or target == "__version__":
                continue
            below = FLOORS.get(target, COMMANDS)
            allowed = below < floor or (here, target) in SAME_FLOOR or (floor == COMMANDS and below == COMMANDS)
            if not allowed:
                wrong.append(f"{path}:{line}: {here} imports {target}")
            if {here, target} == {"data", "models"}:
                wrong.append(f"{path}:{line}: data and models must not see each other")
    assert not wrong, "\n".join(wrong)


def test_modeling_file_stands_alone():
    for name in SHIPS_ALONE:
        file = PACKAGE / name
        assert not imported_rooms(ast.parse(file.read_text())), (
            f"{name} ships beside the weights and must not import skysense_jax"
        )


def test_files_have_one_job():
    long = {str(f.relative_to(ROOT)): n for f in sources() if (n := len(f.read_text().splitlines())) > 400}
    assert not long, f"past 400 lines, look for the second job: {long}"
    assert not list(PACKAGE.rglob("utils.py")), "no utils.py: name the job"
    undocumented = [
        str(f.relative_to(ROOT))
        for f in sources()
        if f.read_text().strip() and not ast.get_docstring(ast.parse(f.read_text()))
    ]
    assert not undocumented, f"a file says its one job in its docstring: {undocumented}"


def test_no_line_is_past_120_columns():
    long = [
        f"{file.relative_to(ROOT)}:{number}: {len(line)} columns"
        for folder in (PACKAGE, ROOT / "tests", ROOT / "configs")
        for file in sorted(folder.rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not long, "\n".join(long)


def test_no_silent_handlers():
    """No bare or catch-all except, no pickle, no dynamic evaluation."""
    wrong = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.ExceptHandler):
                names = [] if node.type is None else [ast.unparse(n) for n in getattr(node.type, "elts", [node.type])]
                if not names or {"Exception", "BaseException"} & set(names):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: catches everything")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"eval", "exec", "pickle.load", "pickle.loads"}:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}")
    assert not wrong, "\n".join(wrong)


def test_processes_are_known_only_where_they_may_be():
    allowed = {"core/mesh.py"}
    for file in sources():
        path = file.relative_to(PACKAGE)
        if str(path) in allowed or room(path) == "run" or room(path) not in FLOORS:
            continue
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in {"process_index", "process_count"}
                and ast.unparse(node.value) == "jax"
            ):
                raise AssertionError(
                    f"{path}:{node.lineno}: only core/mesh.py, run/ and the commands know about processes"
                )
