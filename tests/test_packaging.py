"""The layout that packaging rests on: folders at the top, links in kvtier/, a mapping in setup.cfg."""

import configparser
import fnmatch
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "runtime")
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "tests", "bench")


def read_setup_cfg() -> tuple[dict[str, Path], list[str]]:
    """Return the folder of each package, and the patterns of kvtier's data."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    packages = parser["options"]["packages"].split()
    pairs = (line.split("=") for line in parser["options"]["package_dir"].splitlines() if line)
    folders = {name.strip(): ROOT / folder.strip() for name, folder in pairs}
    assert set(packages) == set(folders), "packages and package_dir name different packages"
    return folders, parser["options.package_data"]["kvtier"].split()


@pytest.mark.parametrize("name", LINKED)
def test_top_level_folder_is_no_package(name: str) -> None:
    """Transformers imports Hugging Face's `kernels`: from the root it must not get, or execute, ours."""
    assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py breaks transformers: remove it"
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s.origin if s else None)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    origin = run.stdout.strip()
    assert origin in ("None", "namespace") or not Path(origin).is_relative_to(ROOT / name)


@pytest.mark.parametrize("name", LINKED)
def test_link_in_kvtier_resolves(name: str) -> None:
    link = ROOT / "kvtier" / name
    assert link.is_symlink(), f"kvtier/{name} is no link: git config core.symlinks true, then check out again"
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert link.is_dir()


def test_every_folder_with_python_files_is_listed() -> None:
    folders, _ = read_setup_cfg()
    found = set()
    for top in ("kvtier", *LINKED):
        for folder, names, files in os.walk(ROOT / top):
            names[:] = [name for name in names if name != "__pycache__"]
            if any(file.endswith(".py") for file in files):
                found.add(Path(folder))
    assert found - set(folders.values()) == set(), "add it to packages and package_dir in setup.cfg"
    assert all(folder.is_dir() for folder in folders.values())


def test_every_data_file_is_listed() -> None:
    _, patterns = read_setup_cfg()
    data = [path for path in (ROOT / "kvtier" / "data").rglob("*") if path.is_file()]
    assert data
    for path in [ROOT / "kvtier" / "py.typed", *data]:
        name = path.relative_to(ROOT / "kvtier").as_posix()
        assert any(fnmatch.fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns), name


def test_text_of_the_demo_is_what_its_source_note_says() -> None:
    note = (ROOT / "kvtier" / "data" / "SOURCE.md").read_text(encoding="utf-8")
    text = gzip.decompress((ROOT / "kvtier" / "data" / "emma.txt.gz").read_bytes())
    assert hashlib.sha256(text).hexdigest() in note
    assert f"{len(text):,} characters" in note
    assert re.fullmatch(r"[\n -~]+", text.decode("ascii"))
    assert text.startswith(b"EMMA\n")
    assert text.endswith(b"\nFINIS\n")


@pytest.mark.slow
@pytest.mark.parametrize("with_links", [True, False], ids=["links", "no links"])
def test_wheel_holds_all_folders_and_the_data(tmp_path: Path, with_links: bool) -> None:
    """Build a wheel, also from a checkout whose links became text files (core.symlinks=false)."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=IGNORED)
    if not with_links:
        for name in LINKED:
            (source / "kvtier" / name).unlink()
            (source / "kvtier" / name).write_text(f"../{name}", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True, timeout=280)

    (wheel,) = tmp_path.glob("kvtier-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"kvtier/py.typed"}
    expected |= {f"kvtier/data/{path.name}" for path in (ROOT / "kvtier" / "data").iterdir()}
    expected |= {f"kvtier/{path.name}" for path in (ROOT / "kvtier").glob("*.py")}
    for name in LINKED:
        expected |= {f"kvtier/{name}/{path.name}" for path in (ROOT / name).glob("*.py")}
    assert names == expected
