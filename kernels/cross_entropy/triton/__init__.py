"""The loss's two passes over a chunk of logits in Triton; the products around them are torch's.

One reads each token's logits and keeps two numbers, the log-sum-exp and the target's logit; one puts the
gradient in the place of the logits. What ranks exchange lies between, and no host waits for how many tokens
have a target: those without one get a gradient of zero.
"""

from .launch import chunks, reduce_logits, write_gradient

__all__ = ["chunks", "reduce_logits", "write_gradient"]
