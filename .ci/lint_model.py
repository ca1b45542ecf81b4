"""The conventions of transformers models, by mlinter, over a standalone model folder.

    python .ci/lint_model.py modeling

`mlinter FOLDER` runs every rule and can leave none out, so this calls its Python interface.
"""

import sys
from pathlib import Path

from mlinter.mlinter import DEFAULT_ENABLED_TRF_RULES, analyze_file, iter_modeling_files

LEFT_OUT = {
    "TRF057",  # @auto_docstring fills the library's own documentation pages; our docstrings are written out
}


def main() -> int:
    """Print what is found; the exit status is 1 if anything is, or if there was nothing to look at."""
    files = list(iter_modeling_files(search_paths=[Path(folder) for folder in sys.argv[1:]]))
    rules = DEFAULT_ENABLED_TRF_RULES - LEFT_OUT
    found = [one for file in files for one in analyze_file(file, file.read_text(encoding="utf-8"), rules)]
    for one in found:
        print(f"{one.file_path}:{one.line_number}: {one.message}")
    print(f"mlinter: {len(files)} files, {len(rules)} rules, {len(found)} findings")
    return int(bool(found) or not files)


if __name__ == "__main__":
    sys.exit(main())
