"""From a dense checkpoint to a Mixture-of-Experts, layer by layer."""
