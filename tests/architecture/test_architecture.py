"""Rules of the code base that a reader may rely on, checked on the sources themselves."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for top in ("spo", "jobs") for p in (ROOT / top).rglob("*.py"))
TEXTS = sorted(
    p
    for top in ("spo", "jobs", "cluster", "tune_configs", "tests")
    for p in (ROOT / top).rglob("*")
    if p.suffix in {".py", ".yaml", ".yml", ".toml", ".html", ".json", ".md", ".txt", ".sh"}
    and p != Path(__file__)
)
MAX_CLASS_LINES = 350
MAX_FUNCTION_LINES = 60
SEES_THE_WHOLE_RUN = re.compile(r"jobs/|spo/(config|sweep|bench)/|spo/pipeline\.py|spo/\w+/job\.py")
"""Files that may know `RunConfig`; every other module takes its slices."""
NAMES_THE_TESTBED = re.compile(
    r"spo/(config/|resolve\.py|api\.py)|(spo/bench/serving|jobs/bench)\.py"
)
"""Files with the word "testbed" as a value: defaults, what they mean, a preset of a benchmark."""
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_import_contracts_hold() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert command, "import-linter is not installed: install the 'dev' extra"
    done = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_classes_are_short() -> None:
    long = [
        f"{relative(path)}:{node.lineno} {node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_CLASS_LINES
    ]
    assert long == []


def test_no_module_is_a_drawer() -> None:
    named = [relative(p) for p in SOURCES if BANNED_NAMES & set(p.with_suffix("").parts)]
    assert named == []


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_functions_are_short() -> None:
    long = [
        f"{relative(path)}:{f.lineno} {f.name} ({f.end_lineno - f.lineno + 1} lines)"
        for path in SOURCES
        for f in functions(path)
        if f.end_lineno is not None and f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        relative(p)
        for p in SOURCES
        if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert silent == []


def imports_of(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import, also of those inside functions; "" for a whole module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return found


def test_only_the_edges_see_the_whole_configuration() -> None:
    """Who has no `RunConfig` can only take slices; annotations need the import."""
    whole = {"RunConfig", "load_config", "run", "load", ""}
    seeing = {
        relative(path)
        for path in SOURCES
        for module, name in imports_of(path)
        if (module, name) == ("spo", "config")
        or (module.split(".")[:2] == ["spo", "config"] and name in whole)
    }
    assert {"spo/pipeline.py", "spo/stage2/job.py"} <= seeing
    assert {path for path in seeing if not SEES_THE_WHOLE_RUN.match(path)} == set()


def test_only_one_module_asks_whether_it_is_the_testbed() -> None:
    asking, naming, importing = set(), set(), set()
    for path in SOURCES:
        place = relative(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value == "testbed":
                naming.add(place)
            elif isinstance(node, ast.Compare | ast.Match):
                parts = list(ast.walk(node))
                words = {part.id for part in parts if isinstance(part, ast.Name)}
                words |= {repr(part.value) for part in parts if isinstance(part, ast.Constant)}
                if words & {"TESTBED", "'testbed'"}:
                    asking.add(place)
        for module, name in imports_of(path):
            if f"{module}.{name}".startswith("spo.testbed") or name == "TESTBED":
                importing.add(place)
    assert asking == {"spo/resolve.py"}
    assert {place for place in naming if not NAMES_THE_TESTBED.match(place)} == set()
    # The measurement of the guarded model is of the testbed itself.
    own = ("spo/testbed/", "spo/bench/guarded")
    assert {place for place in importing if not place.startswith(own)} == {"spo/resolve.py"}


def test_no_broad_except_without_raise() -> None:
    """Steering fails closed: whoever catches everything must raise, or say why not on the line."""
    swallowing = []
    for path in SOURCES:
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
            )
            reasoned = re.search(r"# noqa: BLE001 +\S+ ", lines[node.lineno - 1])
            if broad and not reasoned and not any(isinstance(n, ast.Raise) for n in ast.walk(node)):
                swallowing.append(f"{relative(path)}:{node.lineno}")
    assert swallowing == []


def test_no_pickle() -> None:
    def imported(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Import):
            return {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            # The exception's name alone is needed where torch.load refuses a pickle.
            only_errors = all(alias.name == "UnpicklingError" for alias in node.names)
            return set() if only_errors else {(node.module or "").split(".")[0]}
        return set()

    users = [
        relative(p)
        for p in SOURCES
        for node in ast.walk(ast.parse(p.read_text()))
        if imported(node) & {"pickle", "dill", "cloudpickle", "joblib", "marshal"}
    ]
    assert users == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<![\w./$}])/(work|home|root|Users|mnt|data)/\w",
        r"\bpypi\.org|pythonhosted\.org|registry\.npmjs|huggingface\.co|docker\.io|ghcr\.io",
        r"\b(localhost|127\.0\.0\.1|10\.\d+\.\d+\.\d+|192\.168\.\d+\.\d+):\d+/simple",
    ],
    ids=["machine paths", "registries", "mirrors"],
)
def test_nothing_is_tied_to_a_machine(pattern: str) -> None:
    checked = [p for p in TEXTS if p.relative_to(ROOT).parts[0] in {"spo", "jobs", "tune_configs"}]
    found = [
        f"{relative(path)}:{number}: {line.strip()[:80]}"
        for path in checked
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found == []


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    found = [
        f"{relative(path)}:{number}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


def test_errors_are_raised_with_one_message() -> None:
    """Ray pickles exceptions by their arguments; ours carry exactly one, the message."""
    kinds = {
        node.name
        for node in ast.parse((ROOT / "spo" / "errors.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    wrong = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in kinds
        and (len(node.args) != 1 or node.keywords)
    ]
    assert wrong == []


def test_errors_are_defined_in_one_place() -> None:
    """Private control-flow exceptions aside, nobody invents an error that others cannot import."""
    elsewhere = [
        f"{relative(path)}: {node.name}"
        for path in SOURCES
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(
            isinstance(b, ast.Name) and b.id.endswith(("Error", "Exception")) for b in node.bases
        )
    ]
    assert elsewhere == []
