"""Training prompts from the signatures and docstrings of Python's own standard library.

The library's source is parsed, never imported or run. Prompts depend on the Python version and on nothing else.
"""

import ast
import copy
import hashlib
import math
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dflash_jax.text.humaneval import SOLVE_WORDING, humaneval_problems

_MAX_CHARS = 720
"""Longest question, in characters: about 220 tokens of code, so that a prompt is no longer than most of HumanEval's."""
_MIN_DOC_WORDS = 8
"""Shorter docstrings ("Return the name.") say too little to write a function from."""
_SKIPPED_MODULES = frozenset(
    {"test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "antigravity", "this"}
    # Widgets and build steps by the thousand would drown the rest, and distutils is gone from Python 3.12 on.
    | {"tkinter", "turtle", "distutils", "msilib"}
)
_SKIPPED_FOLDERS = frozenset({"test", "tests", "__pycache__"})

_WORDINGS = {
    # form: (share, wording). The share says how much likelier a form is to come early in the shuffled order.
    "complete": (6.0, SOLVE_WORDING),
    "implement": (2.0, "Write a Python {kind} `{signature}` that does the following:\n\n{doc}"),
    "tests": (1.0, "Write unit tests for the following Python {kind}:\n```python\n{stub}\n```"),
    "example": (1.0, "Show a short example of how to use `{name}` in Python.\n```python\n{stub}\n```"),
    "explain": (1.0, "Explain step by step what this Python code does:\n```python\n{source}\n```"),
    "document": (1.0, "Write a docstring for the following Python code:\n```python\n{source}\n```"),
}


_KIND_SHARES = {"function": 4.0, "method": 1.0, "class": 0.5}
"""The same for kinds: HumanEval's problems are functions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Documented:
    """A documented class, function or method of the standard library."""

    path: str
    """Dotted name with the module, such as "textwrap.TextWrapper.fill"."""
    owner: str | None
    """The class line that a method stands under; None for functions and classes."""
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    doc: str

    @property
    def kind(self) -> str:
        if isinstance(self.node, ast.ClassDef):
            return "class"
        return "method" if self.owner else "function"

    @property
    def signature(self) -> str:
        """The header without `def` and colon: `fill(self, text)`."""
        return _header(self.node).removeprefix("async ").removeprefix("def ").removeprefix("class ").removesuffix(":")


def stdlib_questions() -> dict[str, str]:
    """Return `{"stdlib/textwrap.dedent/complete": question}`, thousands, in a fixed shuffled order.

    Forms: `complete` (HumanEval's wording over signature and docstring; a method becomes a plain function), `implement`
    (the docstring as a task), `tests`, `example`, `explain` and `document` (the code itself, without its docstring).
    Any prefix is a sample of all modules, and the prompts that look most like HumanEval's come early: `complete` ones,
    and functions. Names that are HumanEval entry points are left out, whatever they do.

    Raises:
        InputError: HumanEval's wheel is not installed, so that its names cannot be left out.
    """
    held_out = {problem["entry_point"] for problem in humaneval_problems()}
    questions: dict[str, str] = {}
    ranks: dict[str, float] = {}
    seen: set[str] = set()
    for item in _documented_items():
        if item.node.name in held_out:
            continue
        for form, question in _questions_of(item):
            key = f"stdlib/{item.path}/{form}"
            # The same text under two modules, and the same name under two conditions, count once.
            if key not in questions and question not in seen:
                questions[key] = question
                ranks[key] = _rank(key, share=_WORDINGS[form][0] * _KIND_SHARES[item.kind])
                seen.add(question)
    return {key: questions[key] for key in sorted(questions, key=ranks.__getitem__)}


def _rank(key: str, *, share: float) -> float:
    """Place of a prompt in the shuffled order: the finishing time of an exponential race with `share` as its rate."""
    digest = hashlib.sha256(key.encode()).digest()
    uniform = (int.from_bytes(digest[:8], "big") + 1) / 2**64
    return -math.log(uniform) / share


def _questions_of(item: _Documented) -> Iterator[tuple[str, str]]:
    """Every form of question that fits an item and is short enough."""
    stub, source = _stub(item), _source_without_doc(item)
    fields = {
        "prompt": _problem(item),
        "stub": stub,
        "doc": item.doc,
        "source": source,
        "name": item.path,
        "kind": item.kind,
        "signature": item.signature,
    }
    for form, (_, wording) in _WORDINGS.items():
        if form in ("explain", "document") and not source:
            continue
        if form == "implement" and item.kind == "method":
            continue  # without its class the task means nothing
        question = wording.format(**fields)
        if len(question) <= _MAX_CHARS:
            yield form, question


def _documented_items() -> Iterator[_Documented]:
    """Public documented classes, functions and methods, module by module in alphabetical order."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - _SKIPPED_MODULES):
        single, package = library / f"{name}.py", library / name
        for path in [single] if single.is_file() else sorted(package.rglob("*.py")):
            parts = path.relative_to(library).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not _SKIPPED_FOLDERS.intersection(parts) and not any(map(_is_private, parts)):
                tree = ast.parse(path.read_bytes())
                yield from _items_in(tree.body, prefix=".".join(parts), owner=None)


def _items_in(body: list[ast.stmt], *, prefix: str, owner: str | None) -> Iterator[_Documented]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or _is_private(node.name):
            continue
        path, doc = f"{prefix}.{node.name}", (ast.get_docstring(node) or "").strip()
        if _is_useful(doc):
            yield _Documented(path=path, owner=owner, node=node, doc=doc)
        if isinstance(node, ast.ClassDef) and owner is None:
            yield from _items_in(node.body, prefix=path, owner=_header(node))


def _is_private(name: str) -> bool:
    return name.startswith("_")


def _is_useful(doc: str) -> bool:
    """Long enough to work from, and plain: no quotes or backslashes that would end or bend a docstring."""
    return len(re.findall(r"\w+", doc)) >= _MIN_DOC_WORDS and '"""' not in doc and "\\" not in doc and doc.isascii()


def _header(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """The `def` or `class` line, without decorators and body."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


def _indented(text: str, levels: int = 1) -> str:
    return "\n".join("    " * levels + line if line else "" for line in text.split("\n"))


def _with_doc(header: str, doc: str) -> str:
    """A header and its docstring, laid out as HumanEval does."""
    quotes = '"""'
    inner = f"{quotes} {doc}\n{quotes}" if "\n" in doc else f"{quotes} {doc} {quotes}"
    return f"{header}\n{_indented(inner)}"


def _stub(item: _Documented) -> str:
    """Header and docstring, a method under its class line."""
    stub = _with_doc(_header(item.node), item.doc)
    return f"{item.owner}\n\n{_indented(stub)}" if item.owner else stub


def _problem(item: _Documented) -> str:
    """Header and docstring as a problem of HumanEval: a method stands alone, without `self`. Ends with a newline."""
    node = item.node
    if item.owner and not isinstance(node, ast.ClassDef):
        node, args = copy.copy(node), copy.deepcopy(node.args)
        first = args.posonlyargs or args.args
        if first and first[0].arg in ("self", "cls"):
            del first[0]
        node.args = args
    return _with_doc(_header(node), item.doc) + "\n"


def _source_without_doc(item: _Documented) -> str:
    """A function's code without decorators, comments and docstring; "" for other kinds, and where none is left."""
    body = item.node.body[1:]
    num_lines = body[-1].end_lineno - body[0].lineno if body and body[-1].end_lineno else 0
    # Code of so many lines is over the length limit anyway, and unparsing is what takes the time here.
    if item.kind != "function" or not body or num_lines > _MAX_CHARS // 10:
        return ""
    code = "\n".join(ast.unparse(node) for node in body)
    return f"{_header(item.node)}\n{_indented(code)}"
