"""The rules of the house, read from the sources: who imports whom, who names files, and what a script may be."""

import ast
import importlib.metadata
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from openchatkit.paths import ROOT

# A part may import itself and parts of a lower level; those of level 0 may import each other.
LEVELS = {
    **dict.fromkeys(
        ("errors", "paths", "storage", "jsonl", "texts", "cli", "settings", "progress", "download", "libraries", "web"),
        0,
    ),
    "models": 1,
    **dict.fromkeys(("distributed", "formats"), 2),
    "loading": 3,
    **dict.fromkeys(("data", "retrieval", "minimal20b"), 4),
    **dict.fromkeys(("training", "inference", "convert"), 5),
    "tools": 6,
    "neox": 7,
    "__main__": 8,
}
# Packages that the library is imported without: of extras, or of the tests.
OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    "bm25s",
    "boto3",
    "cupy",
    "faiss",
    "ftfy",
    "lm_eval",
    "matplotlib",
    "moto",
    "openai",
    "psutil",
    "pypdf",
    "pytest",
    "sentence_transformers",
    "sentencepiece",
    "starlette",
    "tensorboard",
    "tiktoken",
    "uvicorn",
    "wandb",
)
COMMAND_FOLDERS = ("data", "pretrained", "training", "tools", "inference", "retrieval", "neox")

# Pieces of the names of files that others read, where a whole literal without spaces (not a sentence) holds one.
ON_DISK = re.compile(
    r"pytorch_(embs|model|lm_head|$)|prank_|\.safetensors|\.idx$|(manifest|state|config|tokenizer|special_tokens_map)\.json"
    r"|(^|[/.])checkpoint_$|^latest$"
)

MODULES = sorted((ROOT / "openchatkit").rglob("*.py"))
# Deeper lie outputs, as data/*/files/ and the models under pretrained/*/.
SCRIPTS = [
    path for folder in COMMAND_FOLDERS for depth in ("*.py", "*/*.py") for path in sorted((ROOT / folder).glob(depth))
]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("[!_]*.py"))  # what several share begins with _
READMES = sorted(
    path for pattern in ("*.md", "*/*.md", "*/*/README.md") for path in ROOT.glob(pattern) if path.parts[-2][0] != "."
)
SHELL = sorted([*ROOT.glob("*.sh"), *ROOT.glob("*/*.sh"), ROOT / ".ci" / "run"])


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """`openchatkit/formats/chat.py` belongs to `formats`, `openchatkit/cli.py` to `cli`."""
    return path.relative_to(ROOT / "openchatkit").parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every import of a module, lazy ones included: (line, dotted name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string that is no docstring, pieces of f-strings included: (line, text)."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_imports_point_down():
    wrong = []
    for path in MODULES:
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            part, target = part_of(path), name.split(".")[1] if name.startswith("openchatkit.") else None
            if name.startswith("."):
                wrong.append(f"{relative(path)}:{line} is relative: {name}")
            elif (
                target and part != target and not (LEVELS[target] < LEVELS[part] or LEVELS[target] == LEVELS[part] == 0)
            ):
                wrong.append(f"{relative(path)}:{line} {part} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_models_and_formats_know_no_ranks_and_no_flags():
    for path in MODULES:
        if part_of(path) in ("models", "formats"):
            names = [name for _, name in imports(ast.parse(path.read_text(encoding="utf-8")))]
            assert not [name for name in names if name.startswith(("torch.distributed", "argparse"))], relative(path)


def test_only_formats_names_files_that_others_read():
    wrong = []
    for path in [*MODULES, *SCRIPTS]:
        if path in MODULES and part_of(path) == "formats":
            continue
        for line, text in literals(ast.parse(path.read_text(encoding="utf-8"))):
            if not re.search(r"\s", text) and ON_DISK.search(text):
                wrong.append(f"{relative(path)}:{line} {text!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_a_script_is_short_and_says_what_it_does(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 20
    assert ast.get_docstring(ast.parse(text))
    # A script's folder comes first on the import path, so its name must not hide another module.
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in importlib.metadata.packages_distributions()


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS, *BENCHMARKS], ids=relative)
def test_no_source_edits_the_import_path_or_imports_stars(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [name for _, name in imports(tree) if name.endswith(".*")]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"]


@pytest.mark.parametrize("path", [*SCRIPTS, *BENCHMARKS], ids=relative)
def test_every_command_answers_help(path, quick_python):
    # Benchmarks import all that they measure; commands answer at once, from scratch too.
    python = quick_python if path in BENCHMARKS else sys.executable
    result = subprocess.run([python, str(path), "--help"], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")
    assert result.stderr == ""


def test_the_library_imports_with_core_dependencies_alone():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    code = f"""
import importlib, sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # importing it raises ImportError
for name in {names}:
    importlib.import_module(name.removesuffix(".__init__"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr


def test_no_two_test_files_share_a_name():
    """Tests are no package, so that pytest and child processes know a file by its name alone."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", SHELL, ids=relative)
def test_shell_is_bash_that_a_mac_has(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    code = re.sub(r"(?m)^\s*#.*$", "", path.read_text(encoding="utf-8"))
    # Newer than bash 3.2: associative arrays, wait -n, arrays from input, case conversion, and these redirections.
    assert not re.search(r"declare -A|wait -n|mapfile|readarray|\$\{\w+(,,|\^\^)|&>>|\|&|\$\{\w+@", code)
    # An empty array counts as unset there, so under `set -u` it needs the form ${a[@]+"${a[@]}"}, unless it never is.
    for name in re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}"', code):
        assert re.search(rf"(?m)^\s*{name}=\(\n?\s*[^)\s]", code), name


TOURS = re.findall(r"`(openchatkit/[\w/]+\.py):([\w.]+)`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))


def test_architecture_names_what_there_is():
    """The tours of ARCHITECTURE.md lead to functions, classes and methods that exist."""
    assert len(TOURS) > 40
    for file, name in TOURS:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            found = [node for node in body if isinstance(node, kinds) and node.name == part]
            assert found, f"{file} has no {name}"
            body = found[0].body


def test_architecture_has_every_room():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = {
        room: int(level)
        for level, rooms in re.findall(r"(?m)^\| (\d) \| (.*?) \|", text)
        for room in re.findall(r"`(\w+)`", rooms)
    }
    assert named == LEVELS


# Words that a stranger stumbles over, in what is written for readers: docstrings, comments and messages.
ODD = re.compile(r"\b(anew|meanwhile|whoever|told|spelt|be had|for want of)\b", re.IGNORECASE)
# A participle as a function's name says what came out; a verb says what the function does.
PARTICIPLE = re.compile(r"_*(\w+ed|written|taken|given|chosen|seen|broken|frozen)(_(up|in|on|out|off))?")
# Verbs that end like participles, and a format's name.
VERBS = ("embed", "feed", "seed", "speed", "need", "restructured")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Every docstring, comment and message of a source: (line, text)."""
    text = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def definitions(path: Path) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_prose_is_plain_english():
    wrong = [
        f"{relative(path)}:{line} {found[0]!r}"
        for path in MODULES
        for line, text in prose(path)
        if " " in text and len(text) < 4000 and (found := ODD.search(text))
    ]
    assert not wrong, "\n".join(wrong)


def test_docstrings_begin_with_a_verb_or_a_noun():
    wrong = []
    for path in MODULES:
        docstrings = [(1, ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))]
        docstrings += [(node.lineno, ast.get_docstring(node)) for node in definitions(path)]
        wrong += [
            f"{relative(path)}:{line}" for line, text in docstrings if re.match(r"(What|Who|Whoever)\b", text or "")
        ]
    assert not wrong, "\n".join(wrong)


def test_functions_are_verbs():
    wrong = []
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or (node.returns and ast.unparse(node.returns) == "bool"):
                continue
            if (found := PARTICIPLE.fullmatch(node.name)) and "_" not in found[1] and found[1] not in VERBS:
                wrong.append(f"{relative(path)}:{node.lineno} {node.name}")
    assert not wrong, "\n".join(wrong)


def test_a_class_name_stands_for_one_thing():
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(relative(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_docstrings_and_comments_name_modules_that_exist():
    modules = {".".join(path.relative_to(ROOT / "openchatkit").with_suffix("").parts) for path in MODULES}
    modules = {name.removesuffix(".__init__") for name in modules}
    wrong = []
    for path in MODULES:
        for line, text in prose(path):
            for name in re.findall(r"`(?:openchatkit\.)?([a-z_0-9]+(?:\.\w+)+)`", text):
                first, *_, last = name.split(".")
                is_file_or_variable = last in ("json", "jsonl") or first == "progress"
                if first in LEVELS and not is_file_or_variable and not is_defined(name, modules):
                    wrong.append(f"{relative(path)}:{line} {name}")
            for name in re.findall(
                r"\b(?:openchatkit|tests|tools|training|inference|retrieval|data)/[\w/-]+\.py\b", text
            ):
                if not (ROOT / name).exists():
                    wrong.append(f"{relative(path)}:{line} {name}")
    assert not wrong, "\n".join(wrong)


def is_defined(name: str, modules: set[str]) -> bool:
    """Whether a dotted name is a module of the library, or a name in one."""
    if name in modules:
        return True
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        if module in modules:
            path = ROOT / "openchatkit" / Path(*parts[:count])
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            return bool(re.search(rf"\b{parts[count]}\b", source.read_text(encoding="utf-8")))
    return False
