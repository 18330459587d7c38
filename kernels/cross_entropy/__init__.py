"""The loss: cross entropy of the head's logits, fused with the head, by chunks of tokens.

    total = Σ_t (lse_t − logit_t[target_t]) + z_loss · lse_t²,    lse_t = log Σ_v exp(logit_t[v])

Sums over the tokens that have a target, never means; the logits of all tokens never exist at once.

Read naive.py (the specification), then eager.py (the chunks, and the gradient computed along with the
loss), then operators.py (what torch knows it by: ``plait::linear_cross_entropy``). sharded.py is the same
where several ranks hold the head's rows, tokens.py each token's loss for evaluation.
"""

from .operators import linear_cross_entropy
from .sharded import VocabularyShard
from .tokens import token_cross_entropy

__all__ = ["VocabularyShard", "linear_cross_entropy", "token_cross_entropy"]
