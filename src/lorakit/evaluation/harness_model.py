"""lm-eval's interface to a loaded model: our chat template, batches, and stored answers.

Requests become the same token ids as in lm-eval's own `hf` model with its chat template applied.
lm-eval is imported with this module, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lorakit.data.chat_template.render import TemplateRefusal, render_chat
from lorakit.evaluation.model_side import ModelSide, Pair
from lorakit.inference.generate import GenerationSettings

ANSWER_TOKENS = 256  # lm-eval's default for tasks without a limit


class HarnessModel(TemplateLM):
    """A `ModelSide` as a model of lm-eval."""

    backend = "causal"

    def __init__(self, side: ModelSide) -> None:
        super().__init__()
        self.side, self.tokenizer = side, side.tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self.side.context

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render turns; without a generation prompt the last turn is left open, to be continued.

        A template that refuses a system turn gets the other turns.
        """
        try:
            text = render_chat(self.tokenizer, chat_history, prompt=add_generation_prompt)
        except TemplateRefusal:
            others = [turn for turn in chat_history if turn["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return self.apply_chat_template(others, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)] if last in text else text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenize; a text that begins with the prefix token's text gets no second one."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if not options and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer each request of (text, generation settings), in order."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        for places in groups.values():
            settings, until = self._settings(requests[places[0]].args[1])
            prompts = [self._prompt(requests[place].args[0]) for place in places]
            found = self.side.generate(prompts, settings, until)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each text, in windows of the model's context."""
        pairs: list[Pair] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(list(c), list(a)) for c, a in map(make_disjoint_window, windows)]
            pairs += found
            counts.append(len(found))
        scores = iter(self.side.loglikelihoods(pairs))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self.side.loglikelihoods([(context, answer) for _, context, answer in requests])

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations, without lm-eval's own progress bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _prompt(self, text: str) -> list[int]:
        bos = getattr(self.tokenizer, "bos_token", None)
        return self.tok_encode(text, False if bos and text.startswith(bos) else None)

    def _settings(self, given: dict[str, Any]) -> tuple[GenerationSettings, list[str]]:
        """Settings of generation, and the texts at which answers end."""
        kwargs = dict(normalize_gen_kwargs(given, ANSWER_TOKENS))
        until = handle_stop_sequences(kwargs.pop("until", None), eos=self.tokenizer.eos_token)
        sampled = bool(kwargs.get("do_sample"))
        settings = GenerationSettings(
            max_new_tokens=int(kwargs["max_gen_toks"]),
            temperature=float(kwargs.get("temperature") or 1.0) if sampled else 0.0,
            top_p=float(kwargs.get("top_p", 1.0)),
            top_k=int(kwargs.get("top_k", 0)),
            repetition_penalty=float(kwargs.get("repetition_penalty", 1.0)),
        )
        return settings, [stop for stop in until if stop]
