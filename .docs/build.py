"""The API reference: ``make docs`` writes it to ``build/docs``, from the docstrings, by pdoc.

A warning of pdoc, such as a module that cannot be imported, fails the build.
"""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import adapeft
import solver

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "docs"
FOLDERS = ("adapeft", "cluster", "deploy", "solver", "tests")


def main() -> None:
    """Writes the pages of every module."""
    # pdoc reads names in a module's __dict__, where adapeft's are only once they have been used, and documents no
    # submodule that a package's __all__ leaves out.
    for name in adapeft.__all__:
        setattr(adapeft, name, getattr(adapeft, name))
    for package in (adapeft, solver):
        package.__all__ += [module.name for module in pkgutil.iter_modules(package.__path__)]
    warnings.filterwarnings("error", module=r"pdoc\.")
    # pdoc looks for the types of a constructor that a NamedTuple or a dataclass makes, or inherits from another module,
    # outside of the module that names them; the fields have them all the same.
    warnings.filterwarnings("ignore", r"Error parsing type annotation .*__init__", module=r"pdoc\.")
    readmes = [path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")]
    pdoc.render.env.globals["readmes"] = {".".join(path.relative_to(ROOT).parts[:-1]) for path in readmes}
    pdoc.render.configure(docformat="google", math=True, template_directory=Path(__file__).parent)
    pdoc.pdoc("adapeft", "cluster", "solver", output_directory=OUT)


if __name__ == "__main__":
    main()
    sys.stdout.write(f"{OUT / 'index.html'}\n")
