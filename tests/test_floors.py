"""The house holds: imports go down only, files stay readable, nothing unsafe slips in."""

import ast
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "skysense_jax"
FLOORS = (
    ("sensor_row",),
    ("sensors", "core"),
    ("configs", "nn", "ops", "data/records"),
    ("data/batches", "data/ingest", "models"),
    ("data/drafting", "data/synthetic", "data/statistics"),
    ("objectives",),
    ("tasks",),
    ("recipes",),
    ("evals", "convert", "draw", "maps"),
    ("run",),
    ("networks",),
    ("evaluation",),
    ("train",),
    ("commands",),
    ("cli",),
)
"""Rooms from the ground up: a room imports those below it (docs/architecture.md)."""

NEIGHBOURS = {("nn", "ops")}
"""Rooms of one floor that may be imported all the same: a layer needs a pure function."""

NEVERS = (
    ("data", "models"),
    ("models", "data"),
    ("data/batches", "data/ingest"),
    ("data/batches", "rasterio"),
    ("data/batches", "PIL"),
    ("core", "flax"),
)
"""(room, what nothing in it imports), beside what the floors forbid."""

SHIPS_ALONE = {"convert/modeling_skysense.py", "convert/modeling_msgfm.py"}  # plain torch, no import of ours
READ_FILES = ("run", "data", "convert", "maps", "draw", "core/files", "core/config", "core/paths")
"""Where files may be opened, beside networks and everything above it."""


def sources() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def tracked(*patterns: str) -> list[pathlib.Path]:
    """Files that git tracks; those of the folder itself where it is no checkout."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return [path for pattern in patterns for path in ROOT.rglob(pattern) if ".venv" not in str(path)]
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


def room(module: str) -> str:
    """The room of a module of this package, "data.ingest.grid" -> "data/ingest"."""
    parts = module.split(".")
    return "/".join(parts[:2]) if parts[0] == "data" and len(parts) > 1 else parts[0]


def level(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def imports(file: pathlib.Path) -> list[tuple[str, int]]:
    """Full names of all that a file imports, with the line."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the full name"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def imported_rooms(file: pathlib.Path) -> list[tuple[str, int]]:
    """Rooms of this package that a file imports, other packages by their name, with the line."""
    own = "skysense_jax."
    rooms = [
        (room(name.removeprefix(own)) if name.startswith(own) else name.split(".")[0], n) for name, n in imports(file)
    ]
    return [(name, line) for name, line in rooms if name != "__version__"]


def test_every_room_has_a_floor():
    known = {name for rooms in FLOORS for name in rooms}
    rooms = {room(".".join(file.relative_to(PACKAGE).with_suffix("").parts)) for file in sources()}
    assert not rooms - known - {"__init__", "data/__init__"}, "docs/architecture.md and FLOORS say where a room stands"


def test_imports_go_down_only():
    wrong = []
    for file in sources():
        here = room(".".join(file.relative_to(PACKAGE).with_suffix("").parts))
        if file.name == "__init__.py":
            continue
        for target, line in imported_rooms(file):
            where = f"{file.relative_to(ROOT)}:{line}: {here} imports {target}"
            if any(target == there for rooms in FLOORS for there in rooms) and target != here:
                if level(target) >= level(here) and (here, target) not in NEIGHBOURS:
                    wrong.append(where)
            if any(
                (here == a or here.startswith(f"{a}/")) and (target == b or target.startswith(f"{b}/"))
                for a, b in NEVERS
            ):
                wrong.append(f"{where}, never")
    assert not wrong, "\n".join(wrong)


def test_nothing_but_the_command_line_imports_a_command():
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: imports {name}"
        for file in sources()
        if file.name != "cli.py"
        for name, line in imports(file)
        if name.startswith("skysense_jax.commands") or name.startswith("skysense_jax.cli")
    ]
    assert not wrong, "\n".join(wrong)


def test_loading_weights_imports_no_objective():
    """Nothing that `networks` needs imports a loss, directly or through others; the recipes of a run's plan apart."""
    seen, queue = set(), ["networks"]
    while queue:
        module = queue.pop()
        if module in seen:
            continue
        seen.add(module)
        path = PACKAGE / (module.replace(".", "/") + ".py")
        if not path.is_file():
            continue
        for name, _ in imports(path):
            parts = name.removeprefix("skysense_jax.").split(".") if name.startswith("skysense_jax.") else []
            queue += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    assert not [name for name in seen if name.split(".")[0] in ("objectives", "tasks", "recipes", "train")], sorted(
        seen
    )


def test_modeling_file_stands_alone():
    for name in SHIPS_ALONE:
        own = [target for target, _ in imports(PACKAGE / name) if target.startswith("skysense_jax")]
        assert not own, f"{name} ships beside the weights and must not import skysense_jax: {own}"


def test_model_names_are_compared_nowhere():
    """What a network is stands in models/systems.py, how it is trained in recipes.py: both are looked up."""
    wrong = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if not isinstance(node, ast.Compare):
                continue
            names = {side.value for side in [node.left, *node.comparators] if isinstance(side, ast.Constant)}
            if names & {"skysense", "msgfm"}:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_core_knows_no_model():
    wrong = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in sorted((PACKAGE / "core").glob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if any(
            word in re.sub("skysense_jax|skysense-jax|SKYSENSE_", "", line).lower() for word in ("skysense", "msgfm")
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_opened_only_where_they_may_be():
    opened = {"open", "read_text", "write_text", "read_bytes", "write_bytes"}
    wrong = []
    for file in sources():
        path = str(file.relative_to(PACKAGE).with_suffix(""))
        below = path.split("/")[0] not in ("networks", "evaluation", "train", "commands", "cli")
        if (
            not below
            or any(path == name or path.startswith(f"{name}/") for name in READ_FILES)
            or f"{path}.py" in SHIPS_ALONE
        ):
            continue
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in opened:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}")
    assert not wrong, "\n".join(wrong)


def test_files_have_one_job():
    long = {
        str(f.relative_to(ROOT)): n for f in tracked("*.py", "*.sh") if (n := len(f.read_text().splitlines())) > 400
    }
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
        for file in tracked("*.py", "*.sh", "*.yaml", "*.toml", ".ci/run")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not long, "\n".join(long)


def test_no_room_is_flat():
    """At most fifteen files at one level of a room, its __init__.py among them: more have walls already."""
    counts = {
        str(folder.relative_to(PACKAGE)): len(list(folder.glob("*.py")))
        for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    }
    assert not {name: n for name, n in counts.items() if n > 15}, counts


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


def test_every_public_name_is_used():
    """A function, class or constant of the package that nothing names, in the package or its users, is dead."""
    texts = {file: file.read_text() for file in tracked("*.py")}
    users = "\n".join(texts.values()) + "\n".join(f.read_text() for f in tracked("*.md", "*.sh", "*.toml"))
    counts: dict[str, int] = {}
    for word in re.findall(r"[A-Za-z_]\w*", users):
        counts[word] = counts.get(word, 0) + 1
    dead = []
    for file in sources():
        for node in ast.parse(texts.get(file) or file.read_text()).body:
            names = []
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name] if not node.name.startswith("__") else []
            elif isinstance(node, ast.Assign):
                names = [
                    target.id for target in node.targets if isinstance(target, ast.Name) and target.id != "__all__"
                ]
            dead += [f"{file.relative_to(ROOT)}: {name}" for name in names if counts.get(name, 0) < 2]
    assert not dead, "\n".join(dead)


def test_processes_are_known_only_where_they_may_be():
    wrong = []
    for file in sources():
        path = file.relative_to(PACKAGE)
        if str(path) == "core/mesh.py" or path.parts[0] in (
            "run",
            "commands",
            "train.py",
            "networks.py",
            "evaluation.py",
        ):
            continue
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in {"process_index", "process_count"}
                and ast.unparse(node.value) == "jax"
            ):
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong, f"only core/mesh.py, run/ and what is above it know about processes: {wrong}"
