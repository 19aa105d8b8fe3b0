"""What the types of the library say, to a user of the public names and to whoever reads the code; and its length."""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from pathlib import Path

from public import callees, own_bases, public_things

SOURCES = sorted((Path(__file__).parent.parent / "src" / "vlmneurons").rglob("*.py"))
JSON = re.compile(r"\b(collections\.abc\.Mapping|dict|Mapping)\[str, (typing\.)?Any\]")
"""Plain values by name, as JSON holds them: settings, and what a file says of itself."""


OPEN = {"vlmneurons.VLM.get: returns"}
"""What a dotted path leads to: a part of the model, or a value of whatever kind that part gives."""


def test_no_public_signature_or_attribute_has_a_type_that_says_nothing_but_json_and_forwarded_keywords():
    loose = []
    for name, callee in callees().items():
        signature = inspect.signature(callee.function)
        types = {
            parameter.name: parameter.annotation
            for parameter in signature.parameters.values()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        types["returns"] = signature.return_annotation
        loose += [f"{name}: {of}: {text}" for of, kind in types.items() if _says_nothing(text := _text(kind))]
    for name, thing in public_things().items():
        for base in own_bases(thing) if inspect.isclass(thing) else ():
            for of, kind in inspect.get_annotations(base).items():
                if not of.startswith("_") and _says_nothing(text := _text(kind)):
                    loose.append(f"{name}.{of}: {text}")
            loose += [f"{name}.{of}: {text}" for of, text in _set_in(base) if _says_nothing(text)]
    loose = [one for one in loose if one.rpartition(": ")[0] not in OPEN]
    assert not loose, "\n".join(loose)


def _set_in(kind):
    """Public attributes that a class's methods set with an annotation, and those they take over from a parameter."""
    for method in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
        if not isinstance(method, ast.FunctionDef):
            continue
        given = {one.arg: one.annotation for one in (*method.args.args, *method.args.kwonlyargs) if one.annotation}
        for node in ast.walk(method):
            if isinstance(node, ast.AnnAssign):
                targets = {node.target: node.annotation}
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in given:
                targets = dict.fromkeys(node.targets, given[node.value.id])
            else:
                continue
            for target, annotation in targets.items():
                match target:
                    case ast.Attribute(value=ast.Name(id="self"), attr=name) if not name.startswith("_"):
                        yield name, ast.unparse(annotation)


def _text(kind):
    return kind if isinstance(kind, str) else inspect.formatannotation(kind)


def _says_nothing(text):
    # NumPy's own names for what it takes say Any of dtypes.
    return re.search(r"\bAny\b", JSON.sub("", re.sub(r"dtype\[(typing\.)?Any\]", "", text))) is not None


def test_at_most_300_types_say_nothing():
    anys = [
        node
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Name) and node.id == "Any"
    ]
    assert len(anys) <= 300


def test_the_type_checker_ignores_at_most_ten_lines_each_with_a_reason():
    ignored = []
    for path in SOURCES:
        lines = tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
        ignored += [
            one.string
            for one in lines
            if one.type == tokenize.COMMENT and re.search("(type|pyright): ignore", one.string)
        ]
    assert len(ignored) <= 10
    assert all(re.fullmatch(r"# pyright: ignore\[\w+\]  \(.+\)", comment) for comment in ignored), ignored


def test_no_function_is_longer_than_80_lines():
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                if body and (body[-1].end_lineno or 0) - body[0].lineno >= 80:
                    long.append(f"{path.name}: {node.name}")
    assert long == []


NO_NOUNS = {
    "again",
    "found",
    "given",
    "here",
    "how",
    "known",
    "one",
    "ours",
    "own",
    "seen",
    "theirs",
    "there",
    "told",
    "what",
}
"""Words that stand for a noun and leave the reader to find out which."""


def test_variables_and_parameters_say_what_they_are():
    vague = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            else:
                continue
            if name.removeprefix("_") in NO_NOUNS:
                vague.append(f"{path.name}:{node.lineno}: {name}")
    assert not vague, "\n".join(vague)
