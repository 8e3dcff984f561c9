"""Draw how far the circuits of GPT-2's heads move when they share keys and values, layer by layer.

python tools/draw_conversion.py docs/results/conversion_heads.json docs/images/conversion_heads.png
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path

METHODS = ("svd", "procrustes", "mean")


def stamp(content: bytes) -> str:
    """What a drawing says of the results that it was made from."""
    return f"drawn from {hashlib.sha256(content).hexdigest()}"


def draw(content: bytes) -> bytes:
    """Return the figure as PNG.

    Args:
        content: of a result file of benchmarks/conversion_heads.py.
    """
    from matplotlib.figure import Figure

    rows = json.loads(content)["rows"]
    counts = [n for n in dict.fromkeys(row["n_kv_head"] for row in rows) if n in (6, 4, 1)]
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axes = figure.subplots(2, len(counts), sharex=True, sharey=True)
    colours = dict(zip(METHODS, ("#1b6ca8", "#6a9f58", "#b5502a"), strict=True))
    for row in rows:
        if row["method"] not in METHODS or row["n_kv_head"] not in counts:
            continue
        column = counts.index(row["n_kv_head"])
        alone = row["n_kv_head"] == 1
        style = "-" if row["grouping"] == "fitted" or alone else "--"
        label = row["method"] if alone else f"{row['method']}, {row['grouping']}"
        for axis, circuit in zip(axes[:, column], ("qk", "ov"), strict=True):
            axis.plot(row[circuit], style, color=colours[row["method"]], label=label, linewidth=1.4)
    for column, n_kv_head in enumerate(counts):
        axes[0, column].set_title(f"{n_kv_head} key/value head{'s' * (n_kv_head > 1)}", fontsize=10)
        axes[1, column].set_xlabel("layer")
        axes[1, column].set_xticks(range(0, 12, 2))
    for axis, circuit in zip(axes[:, 0], ("QK", "OV"), strict=True):
        axis.set_ylabel(f"{circuit}: relative squared error")
        axis.set_ylim(0, 1)
    axes[0, 0].legend(fontsize=7, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, dpi=110, metadata={"Software": "", "Description": stamp(content)})
    return out.getvalue()


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(draw(Path(sys.argv[1]).read_bytes()))
