"""The wheel holds what the tree holds: `packages` is a list, and a list can be forgotten."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = {"hmmnet": "hmmnet", "host": "hmmnet/host", "devices": "hmmnet/devices"}
DATA_SUFFIXES = {".toml", ".json", ".typed"}


def source_files() -> set[str]:
    """Every file of the source tree that a user needs, under the path it has in the wheel."""
    found = set()
    for folder, prefix in SOURCE_FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            through_link = folder == "hmmnet" and relative.parts[0] in {"host", "devices"}
            if path.is_file() and not through_link and (path.suffix == ".py" or path.suffix in DATA_SUFFIXES):
                found.add(f"{prefix}/{relative.as_posix()}")
    return found


def test_links_point_at_the_real_folders() -> None:
    """Type checkers, editors and runs from the checkout see host/ and devices/ through two relative links."""
    for name in ("host", "devices"):
        link = ROOT / "hmmnet" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_every_folder_with_code_is_listed() -> None:
    """A new folder must be added to `packages`, or it is missing from what users install."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    wanted = {Path(name).parent.as_posix().replace("/", ".") for name in source_files() if name.endswith(".py")}
    assert listed == wanted


@pytest.mark.timeout(300)
def test_wheel_holds_the_tree(tmp_path: Path) -> None:
    """Build the wheel from a copy of the tree, and compare its contents with the tree, file by file."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for folder in ("hmmnet", "host", "devices"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(tree),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names - source_files() == set(), "files in the wheel that the tree does not have"
    assert source_files() - names == set(), "files of the tree that the wheel lacks"
    assert {name.split("/")[0] for name in names} == {"hmmnet"}, "a generic name would reach site-packages"
