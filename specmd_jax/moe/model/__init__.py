"""The MoE language model: configurations, layers, experts, families."""
