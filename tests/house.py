"""How large is the house? `python tests/house.py [FOLDER]` prints its measures, a row for each file.

concepts = functions + classes + flags + constants + different string keys of subscripts.
comments = lines with a comment or of a docstring, over all lines.
"""
import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("model", "flow", "data", "train", "evaluate", "sweep", "fit")
COLUMNS = ("lines", "mean width", "max width", "over 100", "comments", "longest", "flags", "concepts")


def words_of(source, tree):
    """The numbers of the lines that hold a comment or a part of a docstring."""
    found = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type == tokenize.COMMENT}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def crowded(tree):
    """Numbers of the lines that begin more than one statement, as `if x: return` and `a; b` do."""
    first, found = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            found |= {node.lineno} & first
            first.add(node.lineno)
    return sorted(found)


def is_flag(node):
    """A field of a Config class, or a call of add_argument."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", "") == "add_argument"
    value = getattr(node, "value", None)
    if not (isinstance(node, ast.AnnAssign) and isinstance(value, ast.Call)):
        return False
    name = getattr(value.func, "id", "")
    help_text = any(keyword.arg == "metadata" for keyword in value.keywords)
    return name == "flag" or name == "field" and help_text


def functions(path):
    """{name: lines} of all functions of a file."""
    return {node.name: node.end_lineno - node.lineno + 1
            for node in ast.walk(ast.parse(Path(path).read_text()))
            if isinstance(node, ast.FunctionDef)}


def measure(path):
    """-> {column: number} of a file, and the names and lengths of its functions."""
    source = Path(path).read_text()
    tree, lines = ast.parse(source), source.splitlines()
    nodes = list(ast.walk(tree))
    widths = [len(line) for line in lines if line.strip()]
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    constants = sum(len(target.elts) if isinstance(target, ast.Tuple) else target.id.isupper()
                    for target in targets if isinstance(target, (ast.Tuple, ast.Name)))
    keys = {node.slice.value for node in nodes if isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)}
    flags = sum(map(is_flag, nodes))
    classes = sum(isinstance(node, ast.ClassDef) for node in nodes)
    count = sum(isinstance(node, ast.FunctionDef) for node in nodes)
    return {"lines": len(lines), "width": sum(widths), "full": len(widths), "max width": max(widths),
            "over 100": sum(width > 100 for width in widths), "words": len(words_of(source, tree)),
            "longest": max(functions(path).values(), default=0), "flags": flags,
            "concepts": count + classes + flags + constants + len(keys),
            "crowded": crowded(tree)}


def measures(folder):
    """The measures of each of the seven files, and of all together."""
    found = {name: measure(Path(folder) / f"{name}.py") for name in FILES}
    together = {key: [one[key] for one in found.values()] for key in found["fit"]}
    found["all"] = {key: (max if key in ("max width", "longest") else sum)(values)
                    for key, values in together.items() if key != "crowded"}
    for one in found.values():
        one["mean width"] = one["width"] / one["full"]
        one["comments"] = one["words"] / one["lines"]
    return found


if __name__ == "__main__":
    print(f"{'':10}", *(f"{name:>10}" for name in COLUMNS))
    for name, one in measures(sys.argv[1] if len(sys.argv) > 1 else ROOT).items():
        cells = [f"{one[c]:10.0%}" if c == "comments" else f"{one[c]:10.0f}" for c in COLUMNS]
        print(f"{name:10}", *cells)
