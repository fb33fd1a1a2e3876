"""Puts the installed package `blocksight` together from the folders that pyproject.toml names."""

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path


def package_folders(root: Path) -> dict[str, Path]:
    """The folder of each top package by its name, `blocksight` first."""
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    return {name: root / folder for name, folder in sorted(setuptools["package-dir"].items())}


def copy(source: Path, target: Path) -> None:
    """Copies a file, or a folder with its contents."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


def link(source: Path, target: Path) -> None:
    """Makes a symbolic link to a file or folder."""
    target.symlink_to(source)


def put_together(root: Path, site: Path, put: Callable[[Path, Path], None] = link) -> None:
    """Makes `site/blocksight` of the tree `root`, for a `site` on the import path. Links follow later changes."""
    for name, folder in package_folders(root).items():
        target = site.joinpath(*name.split("."))
        if target.parent == site:
            target.mkdir(parents=True)
            for entry in sorted(folder.iterdir()):
                if entry.name != "__pycache__":
                    put(entry.resolve(), target / entry.name)
        else:
            put(folder.resolve(), target)
