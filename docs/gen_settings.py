"""Writes the tables of settings in docs/ from the source of train_stage/settings.py, without importing it.

python docs/gen_settings.py           # rewrites the part of each page between its markers
python docs/gen_settings.py --check   # exits with 1 if a page is not what it would write
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "train_stage" / "settings.py"
PAGES = {"settings.md": "Settings", "finetune.md": "FinetuneSettings", "segment.md": "SegmentSettings"}
"""The pages in docs/, and the dataclass whose groups each one shows."""
BEGIN, END = "<!-- settings -->", "<!-- end -->"


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass, as its source says it."""

    name: str
    type: str
    default: str
    text: str


@dataclass(frozen=True)
class Group:
    """One settings dataclass; its fields are set as `name.field`."""

    name: str
    text: str
    settings: list[Setting]


def read_groups(source: str, settings: str = "Settings") -> list[Group]:
    """The groups of a dataclass of settings, in its order. Raises KeyError if it names a class that is missing."""
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    choices = _choices(tree)
    return [
        Group(
            field.name,
            ast.get_docstring(classes[field.type]) or "",
            _inherited(classes, field.type, field.name, choices),
        )
        for field in _fields(classes[settings], "", {})
    ]


def _inherited(
    classes: dict[str, ast.ClassDef], name: str, group: str, choices: dict[str, tuple[str, ...]]
) -> list[Setting]:
    """The fields of a dataclass and of those that it extends, whose order they keep."""
    fields: dict[str, Setting] = {}
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            fields |= {field.name: field for field in _inherited(classes, base.id, group, choices)}
    return list((fields | {field.name: field for field in _fields(classes[name], group, choices)}).values())


def _fields(node: ast.ClassDef, group: str, choices: dict[str, tuple[str, ...]]) -> list[Setting]:
    fields = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        text = _string(following.value) if isinstance(following, ast.Expr) else None
        name = statement.target.id
        allowed = choices.get(f"{group}.{name}", ())
        if allowed and not all(choice in (text or "") for choice in allowed):
            text = f"{text or ''} One of {', '.join(allowed)}.".strip()
        fields.append(Setting(name, ast.unparse(statement.annotation), _default(statement.value), text or ""))
    return fields


def _default(value: ast.expr | None) -> str:
    """A default as it is written in YAML; "derived" where it follows from other settings."""
    if isinstance(value, ast.Name) and value.id == "MISSING":
        return "derived"
    if isinstance(value, ast.Call):  # field(default_factory=lambda: [...])
        factory = value.keywords[0].value
        value = factory.body if isinstance(factory, ast.Lambda) else None
    if value is None:
        return ""
    if isinstance(value, ast.Constant) and (value.value is None or isinstance(value.value, bool)):
        return "null" if value.value is None else str(value.value).lower()
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ast.unparse(value)


def _choices(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    """The allowed values of settings, from the table `_CHOICES`."""
    literals: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            if name == "_CHOICES" and isinstance(value, ast.Dict):
                return {
                    ast.literal_eval(key): literals[item.id] if isinstance(item, ast.Name) else ast.literal_eval(item)
                    for key, item in zip(value.keys, value.values, strict=True)
                    if key is not None
                }
            if isinstance(value, ast.Tuple) and all(isinstance(item, ast.Constant) for item in value.elts):
                literals[name] = ast.literal_eval(value)
    return {}


def _string(node: ast.expr) -> str | None:
    return " ".join(node.value.split()) if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def as_markdown(groups: list[Group]) -> str:
    """A heading and a table per group."""
    lines: list[str] = []
    for group in groups:
        lines += [f"## {group.name}", ""]
        lines += [" ".join(group.text.split()), ""] if group.text else []
        lines += ["| setting | type | default | what it does |", "| --- | --- | --- | --- |"]
        for setting in group.settings:
            cells = (f"`{group.name}.{setting.name}`", setting.type, f"`{setting.default}`", setting.text)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def page_with(page: str, tables: str) -> str:
    """`page` with `tables` between its markers."""
    before, rest = page.split(f"{BEGIN}\n")
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def main() -> None:
    """Writes the pages, or with --check compares them."""
    for name, settings in PAGES.items():
        path = ROOT / "docs" / name
        page = path.read_text(encoding="utf-8")
        wanted = page_with(page, as_markdown(read_groups(SOURCE.read_text(encoding="utf-8"), settings)))
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted, encoding="utf-8")
        elif page != wanted:
            sys.exit(f"docs/{name} is out of date; run python docs/gen_settings.py.")


if __name__ == "__main__":
    main()
