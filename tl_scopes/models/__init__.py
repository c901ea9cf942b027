"""The one door to TransformerLens: which kind of model this is, its hooks, its tokens, one forward pass.

Everything that depends on the kind of model stands in this folder. The rest of the package is mathematics on the
tensors that `trace` returns.
"""

from tl_scopes.models.attention import (
    AttentionLayer,
    AttentionOutOfReachError,
    attention_layers,
    held_attention,
    masked_attention,
)
from tl_scopes.models.embedding import EMBEDDING, embed, embedding_matrix, mean_embedding
from tl_scopes.models.forward import (
    READOUT,
    Trace,
    independence,
    is_readout,
    readout_graph,
    trace,
    undisturbed,
    user_hooks,
)
from tl_scopes.models.interventions import evaluate, predict
from tl_scopes.models.loading import hooked_from_llama, load, load_hooked_llama
from tl_scopes.models.supported import (
    Model,
    batches_cotangents,
    check_model,
    has_backward_hooks,
    has_constant_readout_norm,
    model_name,
)
from tl_scopes.models.tokens import Prompt, Token, as_count, as_int, starts_with_bos, token, token_text, tokenize
from tl_scopes.models.weights import exchanged_weights, fingerprint, shuffled_weights

__all__ = [
    "EMBEDDING",
    "READOUT",
    "AttentionLayer",
    "AttentionOutOfReachError",
    "Model",
    "Prompt",
    "Token",
    "Trace",
    "as_count",
    "as_int",
    "attention_layers",
    "batches_cotangents",
    "check_model",
    "embed",
    "embedding_matrix",
    "evaluate",
    "exchanged_weights",
    "fingerprint",
    "has_backward_hooks",
    "has_constant_readout_norm",
    "held_attention",
    "hooked_from_llama",
    "independence",
    "is_readout",
    "load",
    "load_hooked_llama",
    "masked_attention",
    "mean_embedding",
    "model_name",
    "predict",
    "readout_graph",
    "shuffled_weights",
    "starts_with_bos",
    "token",
    "token_text",
    "tokenize",
    "trace",
    "undisturbed",
    "user_hooks",
]
