"""The question every conversion must answer: is routing better than static pruning of equal cost?"""

import sys
import tempfile
from pathlib import Path

import moesaic

model = sys.argv[1] if len(sys.argv) > 1 else "tiny"
with tempfile.TemporaryDirectory() as scratch:
    for partition, recovery in [
        ("static", "none"), ("cmoe", "none"), ("static", "closed-form"), ("coactivation", "closed-form"),
    ]:  # fmt: skip
        config = moesaic.ConvertConfig(active=0.25, partition=partition, recovery=recovery, tokens=8_192)
        result = moesaic.convert(model, Path(scratch) / f"{partition}-{recovery}", config, force=True)
        ratio = result.perplexity / result.perplexity_dense
        print(f"{partition:14}{recovery:14}{result.plan:10} perplexity x {ratio:.3f}")
