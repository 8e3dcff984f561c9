"""Sliding windows for a model that was trained with full attention (Beltagy et al. 2020, *Longformer*).

No weight changes: a window only hides keys. What a model computes is the same up to the first token that has more
tokens before it than the window holds. From there on it misses the far ones, and with them the first tokens of the
text, on which trained heads lay most of the weight that they have no use for (Xiao et al. 2023, *Efficient Streaming
Language Models with Attention Sinks*): a few sinks keep these visible.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptlab.conversion.layers import rebuild
from gptlab.model.gpt import GPT


def narrow(
    model: GPT,
    window: int | Sequence[int | None] | None,
    sinks: int = 0,
    dilation: int | Sequence[int] = 1,
) -> GPT:
    """Return a new model whose queries see a window of keys; all weights are the source's.

    Args:
        model: the source.
        window: keys that a query sees, itself included: one number, or one per layer, None for all.
        sinks: first tokens that stay visible outside the window.
        dilation: distance between the keys of a window: one number, or one per layer.

    Raises:
        GptlabError: a window of 0, a list that is not of the model's length, sinks or dilation without a window.
    """
    return rebuild(
        model,
        lambda _, heads: heads,
        window=window if isinstance(window, int) or window is None else tuple(window),
        sinks=sinks,
        dilation=dilation if isinstance(dilation, int) else tuple(dilation),
    )
