"""The public surface: what `import wkv` offers, and what it must not cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wkv

SOURCE = Path(wkv.__file__)


def names_for_type_checkers() -> set[str]:
    """The names that the TYPE_CHECKING block of wkv/__init__.py imports."""
    tree = ast.parse(SOURCE.read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    return {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.parametrize("name", wkv.__all__)
def test_every_public_name_resolves(name):
    assert getattr(wkv, name) is getattr(wkv, name)


@pytest.mark.parametrize("name", [name for name in wkv.__all__ if name != "__version__"])
def test_every_public_name_is_documented(name):
    assert getattr(wkv, name).__doc__


def test_type_checkers_see_exactly_the_public_names():
    assert names_for_type_checkers() | {"__version__"} == set(wkv.__all__)


def test_dir_lists_exactly_the_public_names_in_order():
    assert dir(wkv) == sorted(wkv.__all__)
    assert wkv.__dir__() == wkv.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'wkv' has no attribute 'lode'"):
        _ = wkv.lode


def test_star_import_takes_the_public_names_and_nothing_else():
    namespace = {}
    exec("from wkv import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(wkv.__all__)


def test_importing_wkv_loads_no_heavy_library():
    heavy = {"torch", "numpy", "tokenizers", "safetensors", "rich", "cyclopts"}
    code = f"import sys, wkv; wkv.Error, wkv.RWKV7Config, wkv.__version__; print(*{heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


def test_every_error_is_a_wkv_error():
    from wkv import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(classes) > 5
    assert all(issubclass(cls, wkv.Error) and cls.__doc__ for cls in classes)
