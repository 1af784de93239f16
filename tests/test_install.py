"""Each way to install, tried in a copy of this tree and an environment of its own that borrows the packages of this
one.

From the clone's root the folder ``rlfast/`` hides an installed rlfast, so after ``pip install .`` and after a wheel
an import there may fail, but only with the sentence that says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "is a source tree that is not built"
COMMANDS = {
    "import": ("-c", "import rlfast.kernels, rlfast; print(rlfast.backends.why_not('cpu'))"),
    "demo": ("-m", "rlfast.demo", "--help"),
    "info": ("-m", "rlfast.cli", "info"),
    "pytest": ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cli.py", "-k", "info"),
}


def copy_of_tree(target: Path) -> Path:
    """What a commit of this tree would hold, in an empty folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def environment(path: Path) -> Path:
    """A new environment that finds torch and the rest in this one's packages; its Python."""
    venv.create(path, with_pip=True)
    packages = Path(sysconfig.get_paths(vars={"base": str(path), "platbase": str(path)})["purelib"])
    for old in (*packages.glob("setuptools*"), *packages.glob("*distutils*")):  # Python 3.11's is older than is needed
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return path / "bin" / "python"


def run(python: Path, *arguments, cwd: Path):
    """The finished process, with stdout and stderr as one text, free of this process's settings."""
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    keep["RLFAST_BUILD_CUDA"] = "0"  # nvcc takes minutes, and how the package is laid out does not depend on it
    return subprocess.run(
        [str(python), *arguments],
        cwd=cwd,
        env=keep,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )


def pip(python: Path, *arguments, cwd: Path) -> None:
    """``pip``, offline and with this environment's build tools."""
    done = run(
        python, "-m", "pip", "--disable-pip-version-check", *arguments, "--no-deps", "--no-build-isolation", cwd=cwd
    )
    assert done.returncode == 0, done.stdout[-4000:]


def works(done) -> None:
    assert done.returncode == 0, done.stdout[-4000:]


def works_or_says_why(done) -> None:
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if SENTENCE in line]
        assert said and "pip install -e" in said[-1], done.stdout[-4000:]


@pytest.fixture(params=["install", "editable", "wheel"])
def installed(request, tmp_path):
    """(how, the environment's Python, the tree it was installed from).

    The objects that this tree's own install left, which nothing but the compiler made, are not made again.
    """
    tree, python = copy_of_tree(tmp_path / "clone"), environment(tmp_path / "environment")
    for folder in (ROOT / "build").glob("objects-*/cpu"):
        shutil.copytree(folder, tree / folder.relative_to(ROOT))
    if request.param == "install":
        pip(python, "install", ".", cwd=tree)
    elif request.param == "editable":
        pip(python, "install", "-e", ".", cwd=tree)
    else:
        pip(python, "wheel", "-w", "dist", ".", cwd=tree)
        wheel = next((tree / "dist").glob("rlfast-*.whl"))
        pip(python, "install", str(wheel), cwd=tree)
    return request.param, python, tree


def test_installed(installed, tmp_path):
    how, python, tree = installed
    expected = works if how == "editable" else works_or_says_why
    for name, command in COMMANDS.items():
        done = run(python, *command, cwd=tree)
        print(f"{how}, from the clone's root, {name}: exit {done.returncode}")
        expected(done)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("import", "demo", "info"):
        done = run(python, *COMMANDS[name], cwd=elsewhere)
        print(f"{how}, from another folder, {name}: exit {done.returncode}")
        works(done)
    if shutil.which("c++"):
        assert run(python, *COMMANDS["import"], cwd=elsewhere).stdout.strip() == "None", "the C++ kernels are missing"


def test_source_tree_that_is_not_built(tmp_path):
    tree, python = copy_of_tree(tmp_path / "clone"), environment(tmp_path / "environment")
    done = run(python, *COMMANDS["import"], cwd=tree)
    assert done.returncode != 0
    last = done.stdout.strip().splitlines()[-1]
    assert SENTENCE in last and f"pip install -e {tree}" in last


def test_no_compiler(tmp_path, monkeypatch):
    """The install succeeds with the torch backend, and says why there is no other."""
    tree, python = copy_of_tree(tmp_path / "clone"), environment(tmp_path / "environment")
    (tmp_path / "bin").mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "bin"))
        pip(python, "install", "-e", ".", cwd=tree)
    why = run(python, *COMMANDS["import"], cwd=tree)
    works(why)
    assert "not built" in why.stdout and "compiler" in why.stdout, why.stdout
    works(run(python, "-c", "import rlfast, torch; rlfast.token_logps(torch.zeros(1, 3), torch.tensor([1]))", cwd=tree))


def test_commands_name_the_same_python():
    """The tests run what this interpreter has installed, not some other rlfast on the path."""
    done = run(Path(sys.executable), "-c", "import rlfast; print(rlfast.__file__)", cwd=ROOT)
    works(done)
    assert Path(done.stdout.strip()).parent == ROOT / "rlfast"
