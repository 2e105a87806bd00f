"""Any Mixture-of-Experts made cheaper: how many experts run for each token, learnt or calibrated to a budget."""

from ..compat import require

require("moesaic adapt", "train", "accelerate", "peft")
