"""The architecture as a test: floors, no work at import, and calls that the source must not contain.

Imports go down only, never up and never sideways between the rooms of one floor. The checks read the
source with `ast`; each is also shown bad snippets, so that a check which sees nothing cannot pass.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import wkv

PACKAGE = Path(wkv.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "cli": 6,
    "server": 5,
    "finetuning": 5,
    "evaluation": 5,
    "viz": 5,
    "inference": 4,
    "training": 4,
    "loading": 3,
    "models": 2,
    "ops": 1,
    "checkpoints": 1,
    "tokenizers": 1,
    "plots": 1,
    "pretrained": 1,
    "config": 0,
    "state": 0,
    "_native": -1,
    "errors": -1,
    "paths": -1,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    return module.split(".")[1]


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Every wkv module that is imported anywhere in the file: at the top, in functions, for types only."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            path = module.split(".")
            above = path[: len(path) + is_package - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from . import state` names modules; `from .state import State` names a module's contents.
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "wkv" else {base}
    return {name for name in found if name.split(".")[0] == "wkv"}


def floor_faults(tree: ast.AST, module: str, is_package: bool = False) -> list[str]:
    faults = []
    for target in sorted(imports(tree, module, is_package)):
        if target == "wkv" or room(target) not in FLOORS:
            faults.append(f"imports {target}, which is no room")
        elif room(target) != room(module) and FLOORS[room(target)] >= FLOORS[room(module)]:
            faults.append(f"imports {target}: floor {FLOORS[room(target)]} from floor {FLOORS[room(module)]}")
    return faults


DEFINITIONS = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Pass
REGISTRATIONS = {
    "register_autograd",
    "register_backward",
    "refuse_derivative",
    "register_fake",
    "register_kernel",
}  # of torch custom ops


def work_at_import(tree: ast.Module) -> list[str]:
    """Statements of modules and classes that do more than define: loops, bare calls, calls into torch."""
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    return [
        f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}"
        for body in bodies
        for node in body
        if not only_defines(node)
    ]


def only_defines(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or any(
            name.split(".")[-1] in REGISTRATIONS for name in calls(node)
        )
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if isinstance(node, ast.Assign | ast.AnnAssign):
        # TypeVar, ContextVar, re.compile or a custom op is a definition; a tensor is work.
        work = ("torch.", "open", "print", "os.", "subprocess.")
        harmless = ("torch.library.", "torch.device", "os.path.")
        return not any(name.startswith(work) and not name.startswith(harmless) for name in calls(node))
    return isinstance(node, DEFINITIONS)


def calls(node: ast.AST) -> list[str]:
    """The dotted names of everything called below `node`, the bodies of lambdas left out."""
    if isinstance(node, ast.Lambda):
        return []
    here = [ast.unparse(node.func)] if isinstance(node, ast.Call) else []
    return here + [name for child in ast.iter_child_nodes(node) for name in calls(child)]


FORBIDDEN_CALLS = {
    "eval": "it runs text as code",
    "exec": "it runs text as code",
    "compile": "it turns text into code",
    "__import__": "it hides an import from the floors",
    "importlib.import_module": "it hides an import from the floors",
    "pickle.load": "a pickle can run code",
    "pickle.loads": "a pickle can run code",
    "pickle.Unpickler": "a pickle can run code",
    "marshal.loads": "it loads code",
    "shelve.open": "it is a pickle",
    "yaml.load": "it can run code; yaml.safe_load cannot",
    "torch.hub.load": "it downloads code and runs it",
    "os.system": "it runs a shell",
    "os.popen": "it runs a shell",
    "tempfile.mktemp": "another process can take the name first",
    "torch.set_default_dtype": "a library leaves global settings alone",
    "torch.set_default_device": "a library leaves global settings alone",
    "torch.set_grad_enabled": "a library leaves global settings alone",
    "torch.set_num_threads": "a library leaves global settings alone",
    "torch.set_num_interop_threads": "a library leaves global settings alone",
    "torch.set_float32_matmul_precision": "a library leaves global settings alone",
    "torch.use_deterministic_algorithms": "a library leaves global settings alone",
    "torch.manual_seed": "a library draws from generators of its own",
    "random.seed": "a library draws from generators of its own",
}
ENVIRONMENT = {"os.environ", "os.getenv", "os.putenv"}
ALLOWED = {
    ("wkv", "importlib.import_module"): "the lazy public surface",
    ("wkv.training", "importlib.import_module"): "the same: its settings are read without torch",
    ("checkpoints", "torch.load"): "the one importer of .pth",
    ("cli", "torch.set_num_threads"): "`--threads`: there the process is ours",
}


def forbidden(tree: ast.AST, module: str) -> list[str]:
    """Calls and settings that run foreign code, hide imports, or change the process for everybody."""
    place = module if module in ("wkv", "wkv.training") else room(module)
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            hidden = [f"{node.module}.{alias.name}" for alias in node.names]
            faults += [
                f"line {node.lineno}: {name} imported bare, where this check cannot see its calls"
                for name in hidden
                if name in {"torch.load", *FORBIDDEN_CALLS, *ENVIRONMENT} and (place, name) not in ALLOWED
            ]
            if any(alias.name == "*" for alias in node.names):
                faults.append(f"line {node.lineno}: import *")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ENVIRONMENT and place != "paths":
            faults.append(f"line {node.lineno}: {ast.unparse(node)}: paths.py alone reads the environment")
        elif isinstance(node, ast.Call):
            faults += [f"line {node.lineno}: {fault}" for fault in forbidden_call(node, place)]
        elif isinstance(node, ast.Assign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if ast.unparse(target).startswith("torch."):
                    faults.append(f"line {node.lineno}: sets {ast.unparse(target)} for the whole process")
    return faults


def forbidden_call(node: ast.Call, place: str) -> list[str]:
    name = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    faults = []
    if name in FORBIDDEN_CALLS and (place, name) not in ALLOWED:
        faults.append(f"{name}: {FORBIDDEN_CALLS[name]}")
    if name == "torch.load":
        if (place, name) not in ALLOWED:
            faults.append("torch.load outside checkpoints")
        if options.get("weights_only") != "True":
            faults.append("torch.load without weights_only=True")
    if options.get("shell", "False") != "False":
        faults.append("shell=True")
    if options.get("allow_pickle", "False") != "False":
        faults.append("allow_pickle=True")
    if options.get("allow_origins") in {"['*']", "('*',)", "'*'"}:
        faults.append("wildcard CORS")
    if name.startswith(("socket.", "urllib.request.", "http.client.", "requests.")) and place != "server":
        faults.append(f"{name}: sockets belong to the server")
    return faults


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_only(path):
    if path == PACKAGE / "__init__.py":
        return  # the public surface stands above all floors; test_exports.py shows that it is lazy
    assert floor_faults(ast.parse(path.read_text()), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_work_at_import(path):
    assert work_at_import(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_source_contains_no_dangerous_call(path):
    assert forbidden(ast.parse(path.read_text()), module_name(path)) == []


def test_every_room_has_a_floor():
    assert {room(module_name(path)) for path in FILES if path.parent != PACKAGE} <= set(FLOORS)
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} <= set(FLOORS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("wkv.ops.wkv7", "from ..models import build"),
        ("wkv.ops.wkv7", "from ..tokenizers.world import world"),
        ("wkv.inference.session", "def f():\n    from wkv.training import data"),
        ("wkv.state", "if TYPE_CHECKING:\n    from .models import RWKV"),
        ("wkv.state", "from . import config"),
        ("wkv.state", "import wkv.loading"),
        ("wkv.models.base", "import wkv"),
        ("wkv.models.base", "from .. import load"),
    ],
)
def test_the_floors_check_sees(module, source):
    assert floor_faults(ast.parse(source), module)


@pytest.mark.parametrize(
    "source",
    [
        "print('hello')",
        "torch.set_num_threads(1)",
        "for i in range(3):\n    pass",
        "with open('x'):\n    pass",
        "MASK = torch.tril(torch.ones(16, 16))",
        "class A:\n    table = {'mask': torch.zeros(3)}",
        "if sys.platform == 'win32':\n    pass",
        "FAST = torch.compile(step)",
    ],
)
def test_the_import_check_sees(source):
    assert work_at_import(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "'''docstring'''",
        "T = TypeVar('T')",
        "import torch",
        "ROWS = {'a': lambda: torch.zeros(3)}",
        "def f():\n    print(1)",
        "if TYPE_CHECKING:\n    import torch",
    ],
)
def test_the_import_check_lets_definitions_pass(source):
    assert work_at_import(ast.parse(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec('x = 1')",
        "pickle.load(file)",
        "from pickle import loads",
        "torch.load(path, weights_only=True)",
        "subprocess.run('ls', shell=True)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "CORSMiddleware(app, allow_origins=['*'])",
        "socket.create_connection(address)",
        "os.environ['HOME']",
        "from os import environ",
        "from torch import *",
        "torch.manual_seed(0)",
        "torch.backends.cudnn.benchmark = True",
        "importlib.import_module('wkv.cli')",
    ],
)
def test_the_source_check_sees(source):
    assert forbidden(ast.parse(source), "wkv.models.base")


def test_torch_load_needs_weights_only_even_in_checkpoints():
    assert forbidden(ast.parse("torch.load(path)"), "wkv.checkpoints.official")
    assert not forbidden(ast.parse("torch.load(path, weights_only=True)"), "wkv.checkpoints.official")


IMPORT_EVERYTHING = """
import importlib, json, os, random, signal, sys, threading, warnings
import numpy, torch

def process():
    "Everything that an import could change behind a program's back."
    return {
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(numpy.random.get_state()),
        "python generator": str(random.getstate()),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "threads": threading.active_count(),
        "signals": str([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]),
        "warnings": len(warnings.filters),
        "path": sys.path,
    }

deeds = []
def watch(event, arguments):
    if event in {"subprocess.Popen", "os.system", "os.fork", "os.posix_spawn"} or event.startswith("socket."):
        deeds.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        deeds.append(f"writes {arguments[0]}")
sys.addaudithook(watch)
torch.compile = torch.jit.script = torch.jit.trace = lambda *a, **k: deeds.append("compiles")

before = process()
failed = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
after = process()
changed = [key for key in before if before[key] != after[key]]
compilers = sorted({"torch._inductor", "torch.utils.cpp_extension", "matplotlib"} & set(sys.modules))
sys.__stdout__.write(json.dumps({"failed": failed, "changed": changed, "deeds": deeds, "loaded": compilers}))
"""


def test_importing_every_module_changes_nothing_and_says_nothing():
    """A fresh process imports all of wkv: no output, no file written, no process, no socket, no compiler."""
    names = json.dumps([module_name(path) for path in FILES])
    result = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", IMPORT_EVERYTHING, names], capture_output=True, text=True
    )
    assert result.stderr == ""
    assert json.loads(result.stdout) == {"failed": {}, "changed": [], "deeds": [], "loaded": []}
