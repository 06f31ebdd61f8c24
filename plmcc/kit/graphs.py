"""Layers as torch.fx graphs, for passes that rewrite what happens between a layer's modules."""

from __future__ import annotations

from plmcc.ir.blocks import attention_sites
from plmcc.ir.branches import Branch, FeedForward, feed_forward_of, module_of, residual_branches
from plmcc.ir.layers import Layer
from plmcc.ir.modules import cache_argument, is_attention, stack_depths
from plmcc.ir.tracer import KWARGS, fire_hooks
from plmcc.ir.variants import lookup, targets

__all__ = [
    "KWARGS",
    "Branch",
    "FeedForward",
    "Layer",
    "attention_sites",
    "cache_argument",
    "feed_forward_of",
    "fire_hooks",
    "is_attention",
    "lookup",
    "module_of",
    "residual_branches",
    "stack_depths",
    "targets",
]
