"""The documentation is true where a machine can tell: blocks parse, commands, flags, fields, files and links exist."""

import ast
import contextlib
import functools
import io
import itertools
import os
import pathlib
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator, Mapping

import pytest

from skysense_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "skysense_jax"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE_FOLDERS = ("skysense_jax", "configs", "experiments", "benchmarks", "tests", "launch", ".ci")
LANGUAGES = {"bash", "python", "text", "csv", "dockerfile"}
WRITTEN_BY_A_COMMAND = {ROOT / "docs" / "log" / "survival.md"}  # whole pages: their lines are as long as the command's
CONFIGURED = ("train", "compile-check")  # they read --config.section.field=value
SECTIONS = "data|eval|mesh|model|objective|optim|run|schedule"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# Reading a page


def blocks(page: pathlib.Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)


def prose(page: pathlib.Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def inline(page: pathlib.Path) -> list[str]:
    """Text of every `code span`."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands_in(script: str) -> Iterator[list[str]]:
    """The simple commands of a bash block, as words."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        command: list[str] = []
        for word in words:
            if word in ("&&", "||", ";"):
                yield command
                command = []
            elif word.endswith(";"):
                yield [*command, word[:-1]]
                command = []
            else:
                command.append(word)
        if command:
            yield command


def commands_of(page: pathlib.Path) -> list[tuple[list[str], bool]]:
    """(words, whether the command is complete) of every command on a page; code spans may leave arguments out."""
    found = [
        (words, "..." not in words)
        for language, text in blocks(page)
        if language == "bash"
        for words in commands_in(text)
    ]
    for span in inline(page):
        with contextlib.suppress(ValueError):  # a span with one quotation mark is no command
            found.append((shlex.split(span), False))
    return [(words, complete) for words, complete in found if words]


# What exists


@functools.cache
def help_text(*command: str) -> str:
    """What a command prints for --help."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return out.getvalue()


def flags_of(words: list[str]) -> list[str]:
    """Names of the long options in `words`, up to a lone --."""
    words = words[: words.index("--")] if "--" in words else words
    return [word.split("=")[0] for word in words if word.startswith("--")]


@functools.cache
def fields_of(file: pathlib.Path, argument: str = "") -> frozenset[str]:
    """Dotted names of the sections and fields of a configuration."""
    make = runpy.run_path(str(file))["get_config"]
    names: set[str] = set()

    def collect(section: Mapping, prefix: str) -> None:
        for name, value in section.items():
            names.add(prefix + name)
            if hasattr(value, "items"):
                collect(value, f"{prefix}{name}.")

    collect(make(argument) if argument else make(), "")
    return frozenset(names)


@functools.cache
def all_fields() -> frozenset[str]:
    """Fields of any configuration."""
    return frozenset().union(*(fields_of(file) for file in (ROOT / "configs").glob("[a-z]*.py")))


@functools.cache
def code() -> dict[pathlib.Path, str]:
    """Every file of code, with its text."""
    files = [file for folder in CODE_FOLDERS for file in (ROOT / folder).rglob("*")]
    return {file: file.read_text() for file in files if file.suffix in (".py", ".sh", ".yaml")}


def module_files(module: str) -> list[pathlib.Path]:
    """Files of `python -m module`: one, or those of a package with __main__.py. Empty where there is none."""
    path = ROOT / module.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return [path.with_suffix(".py")]
    return sorted(path.glob("*.py")) if (path / "__main__.py").is_file() else []


# Checks of one command; each returns what is wrong


def wrong_fields(words: list[str]) -> list[str]:
    """Fields that the configuration named in the command (or no configuration at all) does not have."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    named = [after for word, after in itertools.pairwise(words) if word == "--config"]
    file, _, argument = (named[0] if named else "").partition(":")
    known = fields_of(ROOT / file, argument) if (ROOT / file).is_file() else all_fields()
    wanted = [flag.removeprefix("--config.") for flag in flags_of(words) if flag.startswith("--config.")]
    return [f"no field {field} in {file or 'any configuration'}" for field in wanted if field not in known]


def wrong_command(words: list[str], complete: bool) -> list[str]:
    """A command of `skysense-jax`; words: behind the program's name."""
    if not words or words[0].startswith("-"):
        return []
    if words[0] not in cli.COMMANDS:
        return [f"no command {words[0]}"]
    name = words[:2] if words[0] == "data" else words[:1]
    known = set(re.findall(r"--[\w-]+", help_text(*name)))
    problems = [
        f"{' '.join(name)} has no {flag}"
        for flag in flags_of(words)
        if flag not in known and not flag.startswith("--config.")
    ]
    if words[0] in CONFIGURED:
        return problems + wrong_fields(words)
    if complete and not problems:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                cli._parser([word for word in words if not word.startswith("-")]).parse_args(words)
        except SystemExit:
            problems.append(said.getvalue().strip().splitlines()[-1])
    return problems


def wrong_module(module: str, words: list[str], complete: bool) -> list[str]:
    """A command `python -m module`, of this project."""
    if module == "skysense_jax.train":
        return wrong_command(["train", *words], complete)
    files = module_files(module)
    if not files:
        return [f"no module {module}"]
    text = "".join(file.read_text() for file in files)
    return [f"{module} has no {flag}" for flag in flags_of(words) if f'"{flag}"' not in text]


def wrong_script(words: list[str], settings: list[str]) -> list[str]:
    """A shell script of this checkout. settings: names of the variables set in front of it."""
    file = ROOT / words[0]
    if not file.is_file() or not os.access(file, os.X_OK):
        return [f"no script {words[0]}"]
    text = file.read_text()
    problems = [f"{words[0]} reads no {name}" for name in settings if name not in text]
    if file.parent.name == "launch":
        names = set(re.findall(r"[\w-]+", text)) | {"dry-run"}
        problems += [f"{words[0]} has no {flag}" for flag in flags_of(words) if flag.removeprefix("--") not in names]
        if "--" in words:
            training = words[words.index("--") + 1 :]
            problems += wrong_command(["train", *training], False)
    return problems


def wrong(words: list[str], complete: bool) -> list[str]:
    """What is wrong with one command, whatever it is."""
    settings = []
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        settings.append(words[0].split("=")[0])
        words = words[1:]
    if not words:
        return []
    program = words[0].removeprefix("./")
    if pathlib.Path(program).name == "skysense-jax":
        return wrong_command(words[1:], complete)
    if words[:2] == ["python", "-m"] and len(words) > 2 and words[2].split(".")[0] in CODE_FOLDERS:
        return wrong_module(words[2], words[3:], complete)
    if program.split("/")[0] in CODE_FOLDERS and program.endswith(".sh"):
        return wrong_script([program, *words[1:]], settings)
    return []


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as web pages of repositories make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# The tests


@every_page
def test_blocks_parse(page):
    problems = []
    for language, text in blocks(page):
        if language not in LANGUAGES:
            problems.append(f"a block in {language or 'no language'!r}; use one of {sorted(LANGUAGES)}")
        elif language == "bash":
            done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
            problems += [done.stderr] * bool(done.returncode)
        elif language == "python":
            ast.parse(text)
    assert not problems, "\n".join(problems)
    assert page.read_text().count("\n```") == 2 * len(blocks(page)), "a fence that is not closed"


@every_page
def test_commands_exist_with_those_flags(page):
    problems = [
        f"{shlex.join(words)}: {problem}" for words, complete in commands_of(page) for problem in wrong(words, complete)
    ]
    assert not problems, "\n".join(problems)


@every_page
def test_fields_of_configurations_exist(page):
    field = re.compile(rf"(?:--)?(?:config\.)?((?:{SECTIONS})(?:\.[a-z]\w*)+)(?:=.*)?")
    names = [match[1] for span in inline(page) if (match := field.fullmatch(span))]
    files = (".py", ".json", ".csv", ".safetensors", ".npz")
    assert not [name for name in names if name not in all_fields() and not name.endswith(files)]


@every_page
def test_files_exist(page):
    """Files and folders in code spans; a word in capitals stands for a name of the reader's."""
    near = (ROOT, PACKAGE, PACKAGE / "data", page.parent)
    basenames = {file.name for file in code()}
    problems = []
    for span in inline(page):
        if " " in span or re.search(r"[A-Z]{3,}|[*:=<{]", span.removesuffix("README.md")):
            continue
        if re.fullmatch(r"[\w.-]+\.(py|sh)", span) and span not in basenames:
            problems.append(f"no file {span} in the code")
        path = re.fullmatch(r"(?:\./)?([\w.-]+/[\w./-]*)", span)
        folder = path and (path[1].endswith("/") or re.search(r"\.(py|sh|md|csv|yaml|png|cff)$", path[1]))
        if folder and not any((start / path[1]).exists() for start in near):
            problems.append(f"no file or folder {span}")
    assert not problems, "\n".join(problems)


@every_page
def test_links_and_pictures_lead_somewhere(page):
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        there = page.parent / file if file else page
        if not there.exists():
            problems.append(f"no file {target}")
        elif anchor and anchor not in anchors(there):
            problems.append(f"no heading {target}")
    assert not problems, "\n".join(problems)


@every_page
def test_a_page_opens_with_its_finding_and_what_to_do(page):
    title, opening = page.read_text().split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title), "a page begins with its title"
    assert re.match(r"[\w*`]", opening), "then comes text: no table, list, picture or code"
    assert len(re.findall(r"[.:](?=\s|$|\*)", opening)) >= 2, "the finding, and what to do: two sentences"


@every_page
def test_lines_are_short_outside_of_tables(page):
    if page in WRITTEN_BY_A_COMMAND:
        return
    width = 100 if page.name == "README.md" else 120
    lines = enumerate(page.read_text().splitlines(), 1)
    assert not [f"{number}: {len(line)}" for number, line in lines if len(line) > width and line[0] != "|"]


@every_page
def test_the_marks_of_tables_are_those_of_the_code(page):
    """A command writes its table between two marks; with other marks on the page it would refuse."""
    for mark in re.findall(r"^<!-- rows: .+ -->$", page.read_text(), re.M):
        assert any(mark in text for text in code().values()), f"no code writes between {mark}"
        assert "\n<!-- end of rows -->" in page.read_text().split(mark)[1]


def test_every_configuration_and_every_command_has_its_place():
    table = (ROOT / "docs" / "configurations.md").read_text()
    assert not [file for file in (ROOT / "configs").glob("[a-z]*.py") if f"`configs/{file.name}`" not in table]
    text = "".join(page.read_text() for page in PAGES)
    assert not [name for name in cli.COMMANDS if f"skysense-jax {name}" not in text]


def test_the_readme_is_under_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


def test_ci_runs_the_command_of_the_readme():
    assert "./tests/run.sh" in "".join(text for _, text in blocks(ROOT / "README.md"))
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec ./tests/run.sh")
    assert "- run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_hooks_are_local():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    hooks = re.findall(r"^ +- id: (\S+)$", text, re.M)
    assert hooks and re.findall(r"repo: (\S+)", text) == ["local"]
    assert re.findall(r"language: (\S+)", text) == ["system"] * len(hooks)


def test_these_checks_see_what_is_wrong():
    """The checks above on commands that do not exist."""
    assert wrong(["skysense-jax", "data", "build", "--catalogue", "C"], True) == ["data build has no --catalogue"]
    assert "required" in wrong(["skysense-jax", "eval", "RUN"], True)[0]
    assert not wrong(["skysense-jax", "eval", "RUN"], False)
    fields = ["--config", "configs/skysense_smoke.py", "--config.model.widht=3"]
    assert wrong(["skysense-jax", "train", *fields], True) == ["no field model.widht in configs/skysense_smoke.py"]
    assert wrong(["python", "-m", "tests.nowhere"], True) == ["no module tests.nowhere"]
    assert wrong(["launch/tpu.sh", "watch", "--spott", "--", *fields[:2]], True) == ["launch/tpu.sh has no --spott"]
