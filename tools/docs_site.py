"""What mkdocs does for this project's site beside its own: reference pages, and files of the code.

The guide links to files outside of docs/, which a reader of the repository can open. The site gets
a copy of each below ``files/``.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each package in the table of contents, and the files that pages link to."""
    for page in _pages(config.nav):
        if page.startswith("reference/"):
            name = page.removeprefix("reference/").removesuffix(".md")
            files.append(File.generated(config, page, content=_reference(name)))
    for path in sorted({path for page in files.documentation_pages() for path in _linked(page)}):
        copy = File.generated(config, _copied(path), content=(ROOT / path).read_bytes())
        files.append(copy)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to files outside of docs/ to their copies."""
    return _LINK.sub(lambda link: f"]({_copied(link[1])})", markdown)


def _reference(package: str) -> str:
    """Return the page of a package: the names in its ``__all__``, or all of its modules.

    A name that is a module's too hides behind it, so such modules follow with what they hold.
    """
    folder = ROOT / package.replace(".", "/")
    init = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    names = re.findall(r'^    "(\w+)",$', init.read_text(), re.MULTILINE)
    lines = [f"# {package}", f"::: {package}", f"    options: {{show_submodules: {not names}}}"]
    for name in names:
        if (folder / f"{name}.py").is_file():
            lines += [f"::: {package}.{name}", "    options: {show_root_heading: false}"]
    return "\n".join(lines).replace("\n:::", "\n\n:::") + "\n"


def _pages(entries: Any) -> list[str]:
    """Return the pages of a table of contents."""
    if isinstance(entries, str):
        return [entries]
    if isinstance(entries, dict):
        entries = entries.values()
    return [page for entry in entries for page in _pages(entry)]


def _linked(page: File) -> list[str]:
    return [link[1] for link in _LINK.finditer(page.content_string)]


def _copied(path: str) -> str:
    """Return where the site has a file of the repository: text, unless it is a page."""
    return f"files/{path}" if path.endswith((".md", ".json")) else f"files/{path}.txt"
