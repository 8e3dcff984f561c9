"""Looking inside a model, as functions: read, take out, put in, move, share, step by step (docs/inspecting.md)."""

from gptlab.inspecting.activations import ablated, patched, trace
from gptlab.inspecting.attention import attention_maps, visible
from gptlab.inspecting.costs import Costs, costs
from gptlab.inspecting.losses import head_effects, token_losses
from gptlab.inspecting.positions import PositionScores, Shift, position_scores, shifted
from gptlab.inspecting.relative import RelativeShares, relative_shares
from gptlab.inspecting.sharing import CircuitErrors, Sharing, share_keys
from gptlab.inspecting.sites import Site, sites
from gptlab.inspecting.steps import Candidate, GenerationStep, generation_steps

__all__ = [
    "Candidate",
    "CircuitErrors",
    "Costs",
    "GenerationStep",
    "PositionScores",
    "RelativeShares",
    "Sharing",
    "Shift",
    "Site",
    "ablated",
    "attention_maps",
    "costs",
    "generation_steps",
    "head_effects",
    "patched",
    "position_scores",
    "relative_shares",
    "share_keys",
    "shifted",
    "sites",
    "token_losses",
    "trace",
    "visible",
]
