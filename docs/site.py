"""What MkDocs needs beside the pages: the reference, the pages of the project's root, formulas, and links
that lead out of this folder.

The pages are written for whoever reads them in the repository. Here a link to a source file becomes one to
its reference, a link to any other file outside of this folder becomes its text, and a formula becomes MathML,
which browsers draw without a script.
"""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "tfmq"
# Pages of the project's root, by their name on the site.
OUTER = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}
# Code is matched first, so that nothing inside it is taken for a formula.
TOKEN = re.compile(
    r"^```math\n(?P<block>.*?)^```$|^```(?P<language>\w+) "
    r"test[^\n]*\n(?P<body>.*?^```)$|(?P<fence>^```.*?^```$)"
    r"|\$`(?P<quoted>[^`]+)`\$|(?P<code>`[^`\n]+`)|(?<![\\\w])\$(?P<plain>[^`$\n]+)\$(?!\w)",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
# Characters that Markdown would read in the text of a formula.
READ = str.maketrans({character: f"&#{ord(character)};" for character in "*_|\\`[]"})


# From a prompt to the next empty line, as doctest has it.
EXAMPLE = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


class Examples(Extension):
    """Lets the reference show doctests as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Put the examples of a docstring into fences."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)


def packages() -> dict[str, list[str]]:
    """Return the modules of the reference by page: a page for every folder of the package, and one for its
    own files.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE.parent).with_suffix("")
        name = ".".join(module.parts[:-1] if module.name == "__init__" else module.parts)
        first = module.parts[1] if len(module.parts) > 2 else "tfmq"
        if module.name != "__main__":
            found.setdefault(f"reference/{first}.md", []).append(name)
    return found


def page_of(path: Path) -> str:
    """Return the page and the anchor of a source file in the reference."""
    module = path.relative_to(SOURCE.parent).with_suffix("")
    first = module.parts[1] if len(module.parts) > 2 else "tfmq"
    return (
        f"reference/{first}.md#{'.'.join(module.parts[:-1] if module.name == '__init__' else module.parts)}"
    )


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the reference to the navigation."""
    assert config.nav is not None
    config.nav.append({"Reference": [{Path(page).stem: page} for page in packages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no file of this folder."""
    for page, modules in packages().items():
        text = "\n\n".join(f"::: {module}" for module in modules)
        files.append(File.generated(config, page, content=f"# {Path(page).stem}\n\n{text}\n"))
    for page, name in OUTER.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links and formulas of a page."""
    if page.file.src_uri.startswith("reference/"):
        return markdown
    home = ROOT if page.file.src_uri in OUTER else ROOT / "docs"
    return TOKEN.sub(_shown, LINK.sub(lambda link: _linked(link, home), markdown))


def _linked(link: re.Match[str], home: Path) -> str:
    text, anchor = link["text"], link["anchor"] or ""
    if "://" in link["target"]:
        return link[0]
    target = (home / link["target"]).resolve()
    if target.is_relative_to(SOURCE) and target.suffix == ".py":
        return f"[{text}]({page_of(target)})"
    if target.is_relative_to(ROOT / "docs"):
        return f"[{text}]({target.relative_to(ROOT / 'docs').as_posix()}{anchor})"
    outer = next((name for name, source in OUTER.items() if target == ROOT / source), None)
    return f"[{text}]({outer}{anchor})" if outer else text


def _shown(token: re.Match[str]) -> str:
    if token["block"]:
        return f'<div class="math">{convert(token["block"].strip(), display="block")}</div>'
    if token["language"]:
        return f"```{token['language']}\n{token['body']}"
    formula = token["quoted"] or token["plain"]
    if not formula:
        return token[0]
    return re.sub(r">([^<]+)<", lambda text: f">{text[1].translate(READ)}<", convert(formula))
