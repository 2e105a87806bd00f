"""Light training of a converted model: text, teacher, losses, balance, and the loop that keeps the best."""

from ..compat import require

require("moesaic finetune", "train", "accelerate", "peft")
