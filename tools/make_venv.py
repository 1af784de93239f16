"""Make an environment that sees the torch of the Python that makes it, if that one has a torch.

python3 tools/make_venv.py .venv
"""

import importlib.util
import os
import pathlib
import sys
import sysconfig
import venv


def main(path):
    """A virtual environment at ``path``; a torch that is already installed is shared, not copied."""
    found = importlib.util.find_spec("torch")
    nested = sys.prefix != sys.base_prefix
    venv.create(path, with_pip=True, system_site_packages=found is not None and not nested)
    if (
        found is not None and nested
    ):  # a virtual environment has no system site of its own: name its packages in a .pth file
        target = pathlib.Path(path, os.path.relpath(sysconfig.get_paths()["purelib"], sys.prefix))
        (target / "_base_environment.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    print("  environment: {}{}".format(path, " (shares the torch that is installed)" if found else ""))


if __name__ == "__main__":
    main(sys.argv[1])
