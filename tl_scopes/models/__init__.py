"""The one door to TransformerLens: which kind of model this is, its hooks, its tokens, one forward pass.

Everything that depends on the kind of model stands in this folder. The rest of the package is mathematics on the
tensors that `trace` returns.
"""

from tl_scopes.models.arguments import as_count, as_int, as_number, as_position
from tl_scopes.models.attention import AttentionLayer, attention_layers
from tl_scopes.models.causality import check_model
from tl_scopes.models.components import Component, Part, absent, components
from tl_scopes.models.embedding import (
    each_embedding,
    embed,
    embedding_matrix,
    embedding_rows,
    holds_positions,
    mean_embedding,
)
from tl_scopes.models.forward import Trace, goes_back_together, independence, trace, undisturbed
from tl_scopes.models.generation import Generated, generate
from tl_scopes.models.hooks import EMBEDDING, READOUT, has_backward_hooks, is_readout, user_hooks
from tl_scopes.models.interventions import (
    AttentionOutOfReachError,
    evaluate,
    held_attention,
    masked_attention,
    predict,
    push,
    zeroed_values,
)
from tl_scopes.models.linear_rules import LinearRules, Rules
from tl_scopes.models.loading import hooked_from_llama, load, load_hooked_llama
from tl_scopes.models.memory import Work, at_once
from tl_scopes.models.patching import PatchingSite, activation_patching
from tl_scopes.models.precision import kept_dtype, precise, precise_dtype, sum_dtype
from tl_scopes.models.prompts import (
    Answer,
    Prompt,
    ReadPrompt,
    each_prompt,
    read_answer,
    read_prompt,
    tokenize,
    where_they_meet,
)
from tl_scopes.models.provenance import Provenance
from tl_scopes.models.readout import has_constant_readout_norm, is_centered, readout_graph, rows_are_apart, unembedding
from tl_scopes.models.spacing import SpacingNote, missing_spaces
from tl_scopes.models.state import ModelState, unwritten
from tl_scopes.models.supported import FOLDER_PREFIX, Model, architecture, autocast_of, model_name
from tl_scopes.models.tokens import (
    Target,
    Token,
    as_batch,
    context_length,
    output_size,
    padding_token,
    read_target,
    readable,
    spacing_hint,
    starts_with_bos,
    token,
    token_text,
    token_texts,
    tokenizer_of,
    vocabulary_size,
)
from tl_scopes.models.weights import exchanged_weights, fingerprint, in_last_blocks, learned, shuffled_weights
from tl_scopes.models.wording import abridged, counted, warn

__all__ = [
    "EMBEDDING",
    "FOLDER_PREFIX",
    "READOUT",
    "Answer",
    "AttentionLayer",
    "AttentionOutOfReachError",
    "Component",
    "Generated",
    "LinearRules",
    "Model",
    "ModelState",
    "Part",
    "PatchingSite",
    "Prompt",
    "Provenance",
    "ReadPrompt",
    "Rules",
    "SpacingNote",
    "Target",
    "Token",
    "Trace",
    "Work",
    "abridged",
    "absent",
    "activation_patching",
    "architecture",
    "as_batch",
    "as_count",
    "as_int",
    "as_number",
    "as_position",
    "at_once",
    "attention_layers",
    "autocast_of",
    "check_model",
    "components",
    "context_length",
    "counted",
    "each_embedding",
    "each_prompt",
    "embed",
    "embedding_matrix",
    "embedding_rows",
    "evaluate",
    "exchanged_weights",
    "fingerprint",
    "generate",
    "goes_back_together",
    "has_backward_hooks",
    "has_constant_readout_norm",
    "held_attention",
    "holds_positions",
    "hooked_from_llama",
    "in_last_blocks",
    "independence",
    "is_centered",
    "is_readout",
    "kept_dtype",
    "learned",
    "load",
    "load_hooked_llama",
    "masked_attention",
    "mean_embedding",
    "missing_spaces",
    "model_name",
    "output_size",
    "padding_token",
    "precise",
    "precise_dtype",
    "predict",
    "push",
    "read_answer",
    "read_prompt",
    "read_target",
    "readable",
    "readout_graph",
    "rows_are_apart",
    "shuffled_weights",
    "spacing_hint",
    "starts_with_bos",
    "sum_dtype",
    "token",
    "token_text",
    "token_texts",
    "tokenize",
    "tokenizer_of",
    "trace",
    "undisturbed",
    "unembedding",
    "unwritten",
    "user_hooks",
    "vocabulary_size",
    "warn",
    "where_they_meet",
    "zeroed_values",
]
