"""RMSNorm, and Mamba-2's gated RMSNorm over groups of channels.

    rms_norm:        y = x / sqrt(mean(x²) + eps) * weight
    add_rms_norm:    x + y, and the same of it
    gated_rms_norm:  the same of x * silu(z), the mean taken over each group of channels

Read naive.py (the specification), then eager.py (the same in cache-sized blocks, with the backward
by hand), then operators.py (what torch knows them by: ``plait::rms_norm``, ``plait::gated_rms_norm``).
split.py is the gated one of a group whose channels several ranks share.
"""

from .operators import add_rms_norm, gated_rms_norm, rms_norm
from .split import gated_rms_norm_split

__all__ = ["add_rms_norm", "gated_rms_norm", "gated_rms_norm_split", "rms_norm"]
