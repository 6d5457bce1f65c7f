"""House rules that a reader would otherwise have to remember, as tests."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hmmnet", "host", "devices")
FOLDERS_WITH_README = (".", "hmmnet", "host", "devices", "tests", "deploy")
BANNED_FILE_NAMES = {"utils", "util", "helpers", "helper", "manager", "misc", "common", "stuff"}
FILE_LINES_MAX = 600
PLACES_OF_ONE_MACHINE = re.compile(r"/work/|/root/|\bhttps?://(?:files|registry|deb|packages|pypi)\.")


def tracked_files() -> list[Path]:
    """The files that git knows or would add; without git (an unpacked archive), every file."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    paths = [ROOT / name for name in listed.stdout.splitlines()] if listed.returncode == 0 else list(ROOT.rglob("*"))
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def python_files(*folders: str) -> list[Path]:
    """Python files below `folders`, through no link."""
    roots = tuple(ROOT / folder for folder in folders)
    return sorted(
        path
        for path in tracked_files()
        if path.suffix == ".py" and path.is_relative_to(ROOT) and any(root in path.parents for root in roots)
    )


SOURCES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in python_files(*FOLDERS)]
ALL_PYTHON = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in python_files(*FOLDERS, "tests")]


@pytest.mark.parametrize("path", ALL_PYTHON)
def test_module_says_what_it_is(path: Path) -> None:
    """Every module with content opens with a docstring."""
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no module docstring"


@pytest.mark.parametrize("path", ALL_PYTHON)
def test_no_file_holds_two_rooms(path: Path) -> None:
    """A file past the limit usually does two things: split it."""
    lines = len(path.read_text().splitlines())
    assert lines <= FILE_LINES_MAX, f"{path.relative_to(ROOT)} has {lines} lines (limit {FILE_LINES_MAX})"


@pytest.mark.parametrize("path", ALL_PYTHON)
def test_names_say_something(path: Path) -> None:
    """No drawer for odds and ends."""
    assert path.stem not in BANNED_FILE_NAMES


def swallowed(tree: ast.AST) -> Iterator[int]:
    """Lines of broad exception handlers that do nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"})
            if broad:
                yield node.lineno


@pytest.mark.parametrize("path", ALL_PYTHON)
def test_no_error_is_swallowed(path: Path) -> None:
    """`except Exception: pass` hides what it was meant to survive."""
    assert list(swallowed(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize("path", SOURCES)
def test_no_stub_is_left(path: Path) -> None:
    """What is not built is not there; it is no function that raises."""
    assert not re.search(r"NotImplementedError|\b(?:TODO|FIXME|XXX)\b", path.read_text())


def test_nothing_names_one_machine() -> None:
    """No path of a developer's machine and no download address of a registry stands in the project."""
    bad = []
    for path in tracked_files():
        if path.suffix in {".py", ".md", ".toml", ".json", ".sh", ""} and path.name != "test_tidy.py":
            text = path.read_text(errors="replace")
            bad += [f"{path.relative_to(ROOT)}: {match[0]}" for match in PLACES_OF_ONE_MACHINE.finditer(text)]
    assert bad == []


@pytest.mark.parametrize("folder", FOLDERS_WITH_README)
def test_folder_has_a_readme(folder: str) -> None:
    """Each top folder says what lives in it."""
    assert (ROOT / folder / "README.md").is_file()


@pytest.mark.parametrize("folder", FOLDERS_WITH_README)
def test_files_named_in_a_readme_exist(folder: str) -> None:
    """A README that names a file that moved is worse than none."""
    base = ROOT / folder
    missing = []
    for name in re.findall(r"`([\w./-]+\.(?:py|md|toml|json|traces))`", (base / "README.md").read_text()):
        places = (base / name, ROOT / name, ROOT / "hmmnet" / name)
        if not any(place.exists() for place in places) and not list(base.rglob(name)):
            missing.append(name)
    assert missing == []


def test_readme_commands_exist() -> None:
    """Every `hmmnet COMMAND` that the README shows is a command."""
    from hmmnet.cli import command_names

    shown = set(re.findall(r"^\s*(?:\S*/)?hmmnet ([a-z]+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    shown |= set(re.findall(r"`hmmnet ([a-z]+)", (ROOT / "README.md").read_text()))
    assert shown, "the README shows no command"
    assert shown <= set(command_names())


def test_test_command_of_readme_is_what_ci_runs() -> None:
    """What `.ci/run` cuts out of the README is the marked block, whole; then it runs it."""
    block = re.findall(r"<!-- tests -->\n```sh\n(.+?\n)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    (cut,) = [line for line in lines if "README.md" in line and line.startswith("sed")]
    command, _, target = cut.rpartition(" > ")
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout == block[0]
    assert len(block) == 1
    assert f"bash -euo pipefail {target} || status=$?" in lines


def test_version_is_in_the_changelog() -> None:
    """The version that is built has its section, or changes after the newest release are listed and the version is ahead of it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)
    released = [tuple(map(int, section.split("."))) for section in sections if section != "Unreleased"]
    assert released == sorted(released, reverse=True)
    if version not in sections:
        assert sections[0] == "Unreleased"
        assert re.search(r"^## \[Unreleased\]\n\n### \w+\n- ", text, flags=re.MULTILINE), "no change is listed"
        assert not released or tuple(map(int, version.split("."))) > released[0]


def test_the_patches_are_where_the_table_says() -> None:
    """host/README.md names all 19 patches of v25; every file and test that it names is there."""
    rows = [line.split("|")[1:-1] for line in (ROOT / "host" / "README.md").read_text().splitlines() if re.match(r"\| \d", line)]
    numbers = [int(number) for row in rows for number in re.findall(r"\d+", re.sub(r"^([\d, ]+).*", r"\1", row[0].strip()))]
    assert sorted(numbers) == list(range(1, 20))
    for _, _, places, shown in rows:
        for place in re.findall(r"`([^`]+)`", places):
            assert (ROOT / "host" / place).is_file(), place
        for test in re.findall(r"`([^`]+)`", shown):
            path, _, name = test.partition("::")
            assert (ROOT / path).is_file(), path
            assert f"def {name}(" in (ROOT / path).read_text() if name else True, test
        assert "not built" in places or "`" in shown, "a patch without a test"
