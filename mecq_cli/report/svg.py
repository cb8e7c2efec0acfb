"""matplotlib's SVG -> SVG for the middle of a page.

Colours become CSS, so that one picture serves light and dark; ids get names of their own, since
all pictures share one page; sizes, metadata and needless digits go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

from mecq_cli.report.html import visible

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_USED = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_FONT = re.compile(r"font:\s*([\d.]+)px[^;]*;?")

ElementTree.register_namespace("", _SVG)


def inline(data: bytes, name: str, title: str, colours: Mapping[str, str]) -> str:
    """A picture as an ``svg`` element.

    Args:
        data: an SVG file of matplotlib's.
        name: that no other picture of the page has; of letters, digits and hyphens.
        title: what it shows, for those who do not see it.
        colours: from what matplotlib was told (#rrggbb) to CSS.
    """
    root = ElementTree.fromstring(data)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata"):
                parent.remove(child)
    used = _used_ids(root)
    for element in root.iter():
        _rename(element, name, used)
        for key, value in element.attrib.items():
            element.set(key, _restyled(value, colours) if key != "id" else value)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    heading = ElementTree.Element(f"{{{_SVG}}}title", {"id": f"{name}-title"})
    heading.text = visible(title)
    root.insert(0, heading)
    _drop_empty(root)
    return ElementTree.tostring(root, encoding="unicode")


def _used_ids(root: ElementTree.Element) -> set[str]:
    used = set()
    for element in root.iter():
        for value in element.attrib.values():
            used.update(_USED.findall(value))
        if _LINK in element.attrib:
            used.add(element.attrib[_LINK].removeprefix("#"))
    return used


def _rename(element: ElementTree.Element, name: str, used: set[str]) -> None:
    own = element.attrib.pop("id", None)
    if own in used:
        element.set("id", f"{name}-{own}")
    link = element.attrib.pop(_LINK, None)
    if link is not None:
        element.set("href", f"#{name}-{link.removeprefix('#')}")
    for key, value in element.attrib.items():
        element.set(key, _USED.sub(rf"url(#{name}-\1)", value))


def _restyled(value: str, colours: Mapping[str, str]) -> str:
    for told, css in colours.items():
        value = value.replace(told, css)
    value = _FONT.sub(r"font-size: \1px;", value)
    return _NUMBER.sub(lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value)


def _drop_empty(root: ElementTree.Element) -> None:
    """Groups and lists of definitions that hold nothing, and line breaks between elements."""
    for parent in list(root.iter()):
        if parent.tag.endswith(("}text", "}title", "}style")):
            continue
        parent.text = parent.tail = None
        for child in list(parent):
            if child.tag.endswith(("}g", "}defs")) and not len(child) and not child.attrib:
                parent.remove(child)
    for child in root:
        child.tail = None
