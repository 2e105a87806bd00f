"""Models: how families name their parts, the MoE block of any model, running layer by layer, devices."""
