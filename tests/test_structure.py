"""The rules of the house, read from the source: who may import whom, what loads nothing, what is never called."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("intarsia", "stage1_tokenizer", "stage2_prior", "pipelines")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAY_IMPORT = {
    "intarsia": {"intarsia"},
    "stage1_tokenizer": {"intarsia", "stage1_tokenizer"},
    "stage2_prior": {"intarsia", "stage2_prior"},
    "pipelines": set(PACKAGES),
}
# Inside a stage, from the bottom up: a room may import what stands before it, and itself.
ROOMS_OF_STAGE_1 = [
    {"data", "quantizers", "nets", "metrics"},
    {"tokenizers"},
    {"objectives"},
]
HEAVY = ("transformers", "lpips", "wandb", "datasets", "matplotlib", "torchvision", "accelerate", "pyarrow", "skimage", "scipy")
ids = {"argvalues": FILES, "ids": [path.relative_to(ROOT).as_posix() for path in FILES]}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, body_only: bool = False) -> Iterator[str]:
    """The absolute names of the modules that a file imports; ``body_only`` leaves out those inside functions and TYPE_CHECKING."""
    nodes = _top_level(tree_of(path)) if body_only else ast.walk(tree_of(path))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _top_level(child)


def test_there_is_something_to_look_at():
    assert len(FILES) > 30 and all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


@pytest.mark.parametrize("path", **ids)
def test_imports_between_the_packages_form_the_dag_and_the_stages_never_meet(path):
    package = path.relative_to(ROOT).parts[0]
    used = {name.split(".")[0] for name in imports_of(path)} & {*PACKAGES, "configs", "tests", "benchmarks", "examples"}
    assert used <= MAY_IMPORT[package], f"{path.name} imports {sorted(used - MAY_IMPORT[package])}"


def _stage_1_floor(room: str) -> int:
    """The floor of a room of stage 1: its place in the list, or above all for the scripts."""
    return next((i for i, rooms in enumerate(ROOMS_OF_STAGE_1) if room in rooms), len(ROOMS_OF_STAGE_1))


def test_inside_stage_1_rooms_import_downwards_alone():
    wrong = []
    for path in (ROOT / "stage1_tokenizer").rglob("*.py"):
        own = path.relative_to(ROOT / "stage1_tokenizer").with_suffix("").parts[0]
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "stage1_tokenizer" or len(parts) < 2 or own == "__init__" or parts[1] == own:
                continue
            same_floor = _stage_1_floor(parts[1]) == _stage_1_floor(own) < len(ROOMS_OF_STAGE_1)
            if _stage_1_floor(parts[1]) > _stage_1_floor(own) or same_floor:
                wrong.append(f"{own} imports {name}")
    assert not wrong, wrong


def test_inside_stage_2_priors_stand_on_the_trunk_and_scripts_on_priors():
    wrong = []
    for path in (ROOT / "stage2_prior").rglob("*.py"):
        own = path.relative_to(ROOT / "stage2_prior").with_suffix("").parts[0]
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "stage2_prior" or own in ("__init__", "train", "evaluate", *parts[1:2]):
                continue
            if parts[1:2] and parts[1] in ("train", "evaluate", "priors"):
                wrong.append(f"{own} imports {name}")
    assert not wrong, wrong


def test_sampling_imports_torch_alone():
    used = {name.split(".")[0] for name in imports_of(ROOT / "stage2_prior/sampling.py")} - set(sys.stdlib_module_names)
    assert used == {"torch"}


def test_modules_import_one_another_without_cycles():
    known = {module_of(path): path for path in FILES}

    def below(module: str) -> set[str]:
        found = set()
        for name in imports_of(known[module], body_only=True):
            target = name if name in known else name.rsplit(".", 1)[0]
            if target in known and target != module:
                found.add(target)
        return found

    graph = {module: below(module) for module in known}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_importing_the_packages_loads_nothing_heavy():
    code = f"import sys, {', '.join(PACKAGES)}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert set(PACKAGES) <= set(out) and not set(out) & set(HEAVY), sorted(set(out) & set(HEAVY))


def test_loading_a_pipeline_does_not_load_the_compiler_of_torch():
    """Arithmetic on the meta device, where ``from_pretrained`` builds, imports it for nothing."""
    look = "print(*(name in sys.modules for name in ('torch._dynamo', 'sympy')))"
    code = f"import sys; from pipelines import TwoStagePipeline; TwoStagePipeline.bundled(); {look}"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.split() == ["False", "False"]


def test_pipelines_exports_three_names():
    import pipelines

    assert sorted(pipelines.__all__) == ["TwoStagePipeline", "load_prior", "load_tokenizer"]
    assert all(callable(getattr(pipelines, name)) for name in pipelines.__all__)


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "torch.hub.load"}


def _origins(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for, so that ``import torch as t`` hides nothing."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dangers(tree: ast.Module, allow_torch_load: bool = False) -> list[str]:
    """What gate E1 forbids, as "line: what"."""
    found, origins = [], _origins(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names] + [str(node.module)]
            bad = [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS | {"torch.load"}]
            found += [f"{node.lineno}: imports {name}" for name in bad]
        if isinstance(node, ast.Constant) and node.value in FORBIDDEN_MODULES:
            found.append(f"{node.lineno}: names {node.value}")
        if isinstance(node, ast.Call):
            head, dot, rest = ast.unparse(node.func).partition(".")
            called = origins.get(head, head) + dot + rest
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {called}")
            if called == "torch.load" and not (allow_torch_load and words.get("weights_only") == "True"):
                found.append(f"{node.lineno}: torch.load")
            for word in ("allow_pickle", "trust_remote_code", "shell"):
                if words.get(word, "False") != "False":
                    found.append(f"{node.lineno}: {word}={words[word]}")
    return found


@pytest.mark.parametrize("path", **ids)
def test_e1_nothing_is_unpickled_evaluated_or_run_through_a_shell(path):
    assert not dangers(tree_of(path), allow_torch_load=path.name == "third_party_weights.py")


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load(p, weights_only=True)",
        "from torch import load",
        "import torch as t\nt.load(p)",
        "import os as o\no.system('ls')",
        "import_module('pickle')",
        "__import__('dill')",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
        "yaml.load(t, Loader=L)",
        "eval('1')",
        "exec(t)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_e1_the_test_itself_sees_each_of_them(code):
    assert dangers(ast.parse(code))
    assert not dangers(ast.parse("np.load(p, allow_pickle=False)\nsubprocess.run(['ls'])\nmodel.eval()\nself.load(p)"))


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    yield "module", tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node


@pytest.mark.parametrize("path", **ids)
def test_every_public_class_and_function_has_a_docstring(path):
    if path.name == "__init__.py" and not path.read_text().strip():
        pytest.fail("an empty __init__.py; a line says what the room holds")
    nameless = [name for name, node in _public(tree_of(path)) if name != "main" and ast.get_docstring(node) is None]  # type: ignore[arg-type]
    assert not nameless, nameless


@pytest.mark.parametrize("path", **ids)
def test_a_file_has_at_most_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_no_file_is_called_utils():
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.parametrize("path", **ids)
def test_errors_are_not_swallowed_and_nothing_is_left_open(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", text)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(step, ast.Pass | ast.Continue) for step in node.body)
            assert not (broad and silent), f"{path.name}:{node.lineno} swallows every error"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_state_dict"):
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert words.get("strict", "True") == "True", f"{path.name}:{node.lineno} loads some of a state and drops the rest"


def shipped() -> Iterator[Path]:
    """The text files of the repository, without what is built or made by runs."""
    folders = [ROOT]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            made = path.name in ("runs", "build", "dist", "wandb", "__pycache__") or path.name.endswith(".egg-info")
            if path.is_dir() and (path.name == ".ci" or not path.name.startswith(".")) and not made:
                folders.append(path)
            elif path.suffix in (".py", ".md", ".toml", ".txt", ".yaml", ".json", ".sh") or path.name in ("Makefile", "run"):
                yield path


def test_no_file_names_a_machine():
    words = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/Us" + "ers/", "py" + "env", "/op" + "t/", "python" + "hosted"]
    files = list(shipped())
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        found += [f"{path.relative_to(ROOT)}: {word}" for word in words if word in text]
    assert len(files) > 60 and not found, found


def test_a_config_stays_small():
    """About 8 fields a configuration; a larger one is several ideas."""
    from intarsia.config import Config
    from intarsia.run_config import RunConfig

    def below(cls):
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    ours = [cls for cls in below(Config) if cls.__module__.split(".")[0] in PACKAGES and not issubclass(cls, RunConfig)]
    assert not {cls.__name__: len(cls.model_fields) for cls in ours if len(cls.model_fields) > 14}


GATES = ["A1", "A3", "A4", "A5", "B3", "B4", "C0", "C1", "C2", "C3", "D1", "D3", "D5", "D6", "E1", "F1", "F2", "F4"]


@pytest.fixture(scope="module")
def names_of_tests():
    trees = [tree_of(path) for path in (ROOT / "tests").rglob("test_*.py")]
    return [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("gate", GATES)
def test_each_promise_of_reliability_has_a_test_of_its_name(gate, names_of_tests):
    assert [name for name in names_of_tests if re.match(rf"test_(\w\d_and_)*{gate.lower()}_", name)]
