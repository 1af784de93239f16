"""What no linter looks at: whitespace, conflict markers, large files, stray paths and stray environment reads.

python tools/hygiene.py
"""

import pathlib
import re
import subprocess
import sys

LARGE = 1 << 20
BINARY = {".png", ".gguf", ".so"}
# A path of one person's machine has no place in a file that others read.
LOCAL_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w")
ENVIRONMENT = re.compile(r"\bos\.(?:environ|getenv)\b")


def tracked():
    """Files under version control that are there."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split("\n")
    return [pathlib.Path(name) for name in listed if name and pathlib.Path(name).is_file()]


def problems(path):
    """What is wrong with one file."""
    if path.stat().st_size > LARGE:
        yield f"{path}: {path.stat().st_size >> 10} KiB, the limit is {LARGE >> 10}"
    if path.suffix in BINARY:
        return
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        yield f"{path}: no newline at the end"
    for number, line in enumerate(text.splitlines(), 1):
        at = f"{path}:{number}"
        if line != line.rstrip():
            yield f"{at}: trailing whitespace"
        if line.startswith(("<<<<<<< ", ">>>>>>> ")):
            yield f"{at}: conflict marker"
        if LOCAL_PATH.search(line):
            yield f"{at}: a path of one machine"
        if path.parts[0] == "rlfast" and path.name != "backends.py" and ENVIRONMENT.search(line):
            yield f"{at}: environment variables are read in rlfast/backends.py alone"


def main():
    """Print every problem; 1 if there is one."""
    found = [problem for path in tracked() for problem in problems(path)]
    print("\n".join(found) if found else f"hygiene: {len(tracked())} files, nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
