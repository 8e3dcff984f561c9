"""The files of the page, read once from the package: no request can name another one."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

HERE = Path(__file__).parent / "static"
REPORT = Path(__file__).parents[1] / "report" / "templates"
MODULES = (
    *("dom.js", "state.js", "api.js", "parts.js", "pickers.js", "colours.js", "chart.js", "tokens.js", "map.js"),
    *("models.js", "losses.js", "maps.js", "sharing.js", "positions.js", "steps.js", "without.js", "costs.js"),
    "main.js",
)
"""In an order in which each imports only from those before it."""
SCRIPTS = ("roofline.js", "calculator.js")
"""The report's own, whose calculator is a part of the page."""
STYLES = ("style.css", "explore.css")
"""The report's, and what is different here."""
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
"""Kinds of files by the end of their names."""
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'none'"
)
"""What the page may load: itself."""


def files() -> dict[str, bytes]:
    """Return the files of the page by name; ``index.html`` is the page."""
    shared = {name: REPORT / name for name in (*SCRIPTS, "style.css")}
    own = {name: HERE / name for name in ("index.html", "explore.css", *MODULES)}
    return {name: path.read_bytes() for name, path in {**shared, **own}.items()}


def policy() -> str:
    """Return the Content-Security-Policy of the page as it is served."""
    return POLICY.format(scripts="'self'", styles="'self'") + "; frame-ancestors 'none'"


def single_file(baked: str) -> str:
    """Return the page as one file that works without a server.

    Args:
        baked: what `gptlab.exploring.export` has put together, in base64.
    """
    parts = {name: content.decode() for name, content in files().items()}
    style = "".join(parts[name] for name in STYLES)
    script = "".join(parts[name] for name in SCRIPTS)
    module = "".join(_without_imports(parts[name]) for name in MODULES)
    page = re.sub(r"<(link|script)\b[^>]*(static/)[^>]*>(</script>)?\n", "", parts["index.html"])
    allowed = POLICY.format(scripts=f"{_hash(script)} {_hash(module)}", styles=_hash(style))
    head = f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n<style>{style}</style>\n</head>'
    tail = f'<script type="application/octet-stream" id="baked">{baked}</script>\n<script>{script}</script>\n'
    tail += f'<script type="module">{module}</script>\n</body>'
    for end, more in (("</head>", head), ("</body>", tail)):
        before, after = page.split(end)
        page = before + more + after
    return page


def _without_imports(module: str) -> str:
    """Return a module's source as a part of a larger one: names at the top of modules are all different."""
    return re.sub(r"^export ", "", re.sub(r"^import .*\n", "", module, flags=re.M), flags=re.M)


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
