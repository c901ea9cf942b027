"""A prompt to explore: maps of several scopes in one page that answers to the mouse and the keys."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tl_scopes import models
from tl_scopes.api import answer_map, attribution_map
from tl_scopes.circuits.paths import Paths
from tl_scopes.models import Answer, Model, Prompt, Rules
from tl_scopes.results.attribution_map import AttributionMap
from tl_scopes.scopes.scope import Scope, require_scope
from tl_scopes.scopes.semantic import SemanticScope
from tl_scopes.views import explorer as view
from tl_scopes.views.markup import saved


@dataclass(frozen=True, eq=False, repr=False)
class Explorer:
    """Maps of one prompt, as a page to explore: see `explore`, which makes it. It never changes.

    In a notebook it shows itself in a frame, which a saved notebook keeps.

    Attributes:
        maps: one map for each scope, all of the same tokens.
        carried: what `carried_by(lin, scope, by="position")` returned, for the slider of layers; None is no slider.
        bos: whether the first token is a BOS token, which the page can set aside.
        ending: the token that the last prediction is about, where each is about the token that follows in the text or
            the answer: then the page shows it too, and says of each token what moved it. None where predictions are
            about the likeliest token.
    """

    maps: tuple[AttributionMap, ...]
    carried: Paths | None = None
    bos: bool = False
    ending: str | None = None

    def __post_init__(self) -> None:
        if not self.maps:
            raise ValueError("an explorer needs at least one map, got none: give at least one scope.")
        tokens = self._tokens
        for one in self.maps:
            last = one.answers[-1]
            if last.tokens.tolist() != tokens:
                raise ValueError(
                    f"the maps are about different tokens, {len(tokens)} of {self.maps[0].answers[-1].scope} and "
                    f"{len(last.tokens)} of {last.scope}: make them from one prompt."
                )
            if any(list(answer.positions) != list(range(answer.position + 1)) for answer in one):
                raise ValueError(
                    f"the map of {last.scope} lacks tokens that were set aside or put together: give the whole map, of "
                    "which the page sets tokens aside by itself."
                )
        if self.carried is not None:
            if self.carried.by != "position":
                raise ValueError(
                    f"carried is by {self.carried.by!r}, and the slider of layers needs positions: give "
                    'carried_by(lin, scope, by="position").'
                )
            if self.carried.tokens.tolist() != tokens[: len(self.carried.tokens)]:
                raise ValueError(
                    f"carried is about {len(self.carried.tokens)} tokens with which the prompt of {len(tokens)} does "
                    "not begin: linearise the same prompt."
                )
            shown = [one.answers[-1] for one in self.maps]
            if not any(one.rules == self.carried.rules for one in shown):
                models.warn(
                    f"carried splits the scores of {self.carried.question}, and the page shows those of "
                    f"{shown[0].question}: linearise for carried_by with rules={shown[0].rules!r}, as the maps are."
                )
        cells = sum(len(answer.scores) for one in self.maps for answer in one)
        _require_small(
            cells + (0 if self.carried is None else self.carried.values.numel()), len(tokens), len(self.maps)
        )

    @property
    def _tokens(self) -> list[int]:
        return self.maps[0].answers[-1].tokens.tolist()

    @property
    def str_tokens(self) -> tuple[str, ...]:
        """The text of each token."""
        return self.maps[0].str_tokens

    def __repr__(self) -> str:
        scopes = ", ".join(one.answers[-1].question for one in self.maps)
        layers = "" if self.carried is None else f", {models.counted(len(self.carried.layers), 'layer')}"
        first, last = self.maps[0].answers[0], self.maps[0].answers[-1]
        read, shown = first.position + 1, len(self.str_tokens) + (self.ending is not None)
        tokens = models.counted(shown, "token")
        if self.ending is not None and read != 1:
            tokens = f"{models.counted(read, 'token')} and {shown - read} of an answer"
        return f"Explorer({scopes}: {tokens}{layers}, {last.model})"

    def to_html(self, path: str | Path | None = None) -> str:
        """One page that holds all it needs: it asks no network. `path` is where to write it.

        Where no script runs, it shows the static heat map of the first scope.
        """
        return saved(view.page(self), path)

    def _repr_html_(self) -> str:
        return view.fragment(self)


def explore(
    model: Model,
    prompt: Prompt,
    scopes: Scope | Sequence[Scope] = SemanticScope(),
    *,
    answer: Answer | None = None,
    carried: Paths | None = None,
    target: Literal["likeliest", "next"] = "likeliest",
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
    rules: Rules = None,
) -> Explorer:
    """A page to explore a prompt: hover a token to see what moved the prediction after it, with Shift what it moves.

    A click pins a token, the arrow keys go from token to token and from scope to scope. The BOS token and what a chat's
    template wrote can be set aside; a link restores what is seen.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: as in `linearize`; also a chat.
        scopes: the questions, between which the page switches; one or several, by default `SemanticScope()`.
        answer: text, token ids, or what `generate` returned: what was said after the prompt. Then only the tokens of
            the answer are explained, as in `answer_map`, each from the prompt and the answer before it.
        carried: what `carried_by(lin, scope, by="position")` returned for this prompt: then a slider shows at which
            positions the influence of a token stands before each layer. There is a warning where it was made under
            other rules than the maps.
        target, wrt, of, prepend_bos, checkpoint, rules: as in `attribution_map`.

    Cost: for each scope that of `attribution_map`, or of `answer_map`, with one forward pass. A `FisherScope()` goes
        back 32 times for each token that is explained, and takes some thirty times as long as a `SemanticScope()`. The
        page takes 8 bytes for each score.

    Raises: as `attribution_map` and `answer_map` do. ValueError for an answer together with target="next"; for no
        scopes; before anything is computed, for more scores than a page holds; for a `carried` of another prompt or not
        by position.

    Example:
        >>> page = tls.explore(model, "The keys to the old cabinet near the door", [tls.SemanticScope()])
        >>> page
        Explorer(SemanticScope(): 10 tokens, tiny)
        >>> page.to_html().startswith("<!doctype html>")
        True
        >>> tls.explore(model, "The keys to the old cabinet near the door", tls.SemanticScope(), answer=" are old.")
        Explorer(SemanticScope(): 10 tokens and 3 of an answer, tiny)
    """
    asked: list[Any] = list(scopes) if isinstance(scopes, Iterable) and not isinstance(scopes, str) else [scopes]
    for scope in asked:
        require_scope(scope)
    if carried is not None and not isinstance(carried, Paths):
        raise TypeError(
            f'carried takes what carried_by(lin, scope, by="position") returns, got a {type(carried).__name__}.'
        )
    models.check_model(model)
    tokens = models.tokenize(model, prompt, prepend_bos)
    options: dict[str, Any] = {"wrt": wrt, "of": of, "prepend_bos": prepend_bos, "checkpoint": checkpoint}
    options |= {"rules": rules}
    bos = models.starts_with_bos(model, tokens)
    if answer is not None:
        if target != "likeliest":
            raise ValueError(
                f"target={target!r} is about the tokens of the prompt, and answer= about those of an answer: give one "
                "of them."
            )
        said, _ = models.read_answer(model, answer, tokens)
        columns = len(tokens) + len(said) - 1
        _require_small(len(asked) * len(said) * columns, columns, len(asked))
        rows = [answer_map(model, prompt, answer, scope, **options) for scope in asked]
        return Explorer(tuple(one.map for one in rows), carried, bos, rows[0].answer_texts[-1] if rows else None)
    _require_small(len(asked) * len(tokens) * (len(tokens) + 1) // 2, len(tokens), len(asked))
    maps = tuple(attribution_map(model, prompt, scope, target=target, **options) for scope in asked)
    ending = models.token_text(model, int(tokens[-1])) if target == "next" else None
    return Explorer(maps, carried, bos, ending)


def _require_small(cells: int, tokens: int, scopes: int) -> None:
    """Refuse a page that a browser would open slowly.

    Raises:
        ValueError: with the size and what makes it smaller.
    """
    if cells > view.LARGEST:
        fewer = f"fewer scopes than {scopes}, or " if scopes > 1 else ""
        raise ValueError(
            f"the page would hold {cells:,} scores of {tokens} tokens, some {8 * cells / 1e6:.0f} MB, and a browser "
            f"opens {view.LARGEST:,} well: ask {fewer}a shorter prompt, or call attribution_map, whose picture has any "
            "size."
        )
