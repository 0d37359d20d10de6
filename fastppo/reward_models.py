"""Networks as rewards: sequence-classification models, and reward adapters on the policy's own base."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.models.loading import find_file

# Stands in the configuration of a model that RewardTrainer trained: it expects an EOS after every text.
ENDS_WITH_EOS = "fastppo_text_ends_with_eos"
# Beside an adapter, whose configuration has no room for it, RewardTrainer writes it into this file.
ADAPTER_FILE = "reward_adapter.json"
_NO_LIMIT = 2**20  # tokenizers without a limit of their own name an enormous one

Row = dict[str, list[int]]  # what a network gets of one text: input_ids and whatever else the tokenizer makes


def as_reward(model: Any, tokenizer: Any) -> ModelReward | AdapterReward:
    """Return the reward that a network or a pipeline stands for; `tokenizer` is the policy's."""
    if is_pipeline(model):
        if not _is_a(model, "TextClassificationPipeline"):
            raise ValueError(
                f"a {type(model).__name__} gives no scores; pass one for 'text-classification', or call it in a "
                "function (prompts, completions) -> scores"
            )
        return ModelReward(model.model, model.tokenizer)
    return AdapterReward(model, tokenizer) if hasattr(model, "compute_reward_score") else ModelReward(model)


def is_pipeline(given: Any) -> bool:
    """Whether something is one of transformers' pipelines, found out without importing them."""
    return _is_a(given, "Pipeline")


def _is_a(given: Any, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("transformers.") for kind in type(given).mro())


class ModelReward:
    """The score of a sequence-classification model for prompt and completion together; None for a text without tokens.

    The text is decoded and encoded again with the reward model's own tokenizer, a chat with that one's template. With
    one label the score is its logit; with several it is the logit of `label`, a number or a name in the model's
    configuration, by default the last. With `probability` it is that label's share of the softmax instead (of one
    label alone, the sigmoid): what a text-classification pipeline calls its score. `add_eos` ends every text by EOS; by
    default that is done for models that RewardTrainer trained, of which an adapter loaded from disk does not tell.
    Raises ValueError for a model that is no sequence-classification model, has no such label, or names no tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        label: int | str = -1,
        probability: bool = False,
        batch_size: int = 32,
        add_eos: bool | None = None,
    ):
        config: Any = getattr(model, "config", None)
        if not isinstance(getattr(config, "num_labels", None), int):
            raise ValueError(
                f"{type(model).__name__} has no config.num_labels, expected a sequence-classification model; call any "
                "other network in a function (prompts, completions) -> scores and pass that as the reward"
            )
        if tokenizer is None and not config._name_or_path:
            raise ValueError(
                f"{type(model).__name__} made in memory names no tokenizer; pass ModelReward(model, tokenizer) instead"
            )
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(config._name_or_path)
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.label, self.probability = _label_number(config, label), probability
        self.add_eos = getattr(config, ENDS_WITH_EOS, False) if add_eos is None else add_eos

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> Tensor:
        """Return one score per completion, (B,) fp32, NaN for a text without tokens."""
        limit = _limit(self.model, self.tokenizer)
        pairs = zip(prompts, completions, strict=True)
        rows = [_encode(prompt, completion, self.tokenizer, limit, self.add_eos) for prompt, completion in pairs]
        return _in_batches(rows, self.batch_size, self._score)

    def _score(self, rows: list[Row]) -> Tensor:
        """Return the scores (B,) on the host, of texts padded on the right."""
        config = self.model.config.get_text_config()
        pad_id, longest = config.pad_token_id, max(len(row["input_ids"]) for row in rows)
        ends = {row["input_ids"][-1] for row in rows}
        # Such models find a row's last token as the last that is not their pad id: without one, any that ends no row.
        chosen = pad_id if pad_id is not None else next(i for i in range(len(rows) + 1) if i not in ends)
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        fill, taken = {"input_ids": chosen}, inspect.signature(self.model.forward).parameters
        inputs = {
            name: torch.tensor([row[name] + [fill.get(name, 0)] * (longest - len(row[name])) for row in rows])
            for name in rows[0]
            if name in taken
        }
        config.pad_token_id = chosen
        try:
            output = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})
        finally:
            config.pad_token_id = pad_id
        logits = getattr(output, "logits", None)
        if logits is None or logits.dim() != 2:
            shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ValueError(
                f"{type(self.model).__name__} gives {shape}, expected (texts, labels); load it as an "
                "AutoModelForSequenceClassification"
            )
        if self.probability:
            logits = logits.float().sigmoid() if logits.shape[1] == 1 else logits.float().softmax(-1)
        scores: Tensor = logits[:, self.label].float().cpu()
        return scores


class AdapterReward:
    """The score of a policy's own reward adapter for prompt and completion together; None for a text without tokens.

    Tokens are scored as they were sampled, but for special ones at the end, if the adapter has no tokenizer beside it
    or one that is provably the policy's (`tokenizer`); otherwise, and for chats, the text is encoded with the adapter's
    tokenizer and template. The score is the last token's for `label`. `add_eos` ends every text by EOS; by default that
    is done for adapters that RewardTrainer wrote. Raises ValueError for a model without a reward adapter.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, label: int = -1, batch_size: int = 32, add_eos: bool | None = None
    ):
        if model.reward_adapter is None:
            raise ValueError(
                f"the {type(model).__name__} has no reward adapter; load it with from_pretrained(..., "
                "reward_adapter=PATH), or pass a function (prompts, completions) -> scores"
            )
        own = _saved_tokenizer(model.reward_adapter)
        self.reads_tokens = own is None or is_same_tokenizer(own, tokenizer)
        self.tokenizer = tokenizer if self.reads_tokens else own
        self.model, self.label, self.batch_size = model, label, batch_size
        self.add_eos = _is_ended(model.reward_adapter) if add_eos is None else add_eos

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_ids: Sequence[list[int]] | None = None,
        completion_ids: Sequence[list[int]] | None = None,
        **columns: Any,
    ) -> Tensor:
        """Return one score per completion, (B,) fp32, NaN for a text without tokens."""
        limit = _limit(self.model, self.tokenizer)
        texts = list(zip(prompts, completions, strict=True))
        if self.reads_tokens and prompt_ids is not None and completion_ids is not None:
            tokens: list[Any] = [[*pair[0], *pair[1]] for pair in zip(prompt_ids, completion_ids, strict=True)]
        else:
            tokens = [None] * len(texts)
        rows = [self._row(*text, ids, limit) for text, ids in zip(texts, tokens, strict=True)]
        return _in_batches(rows, self.batch_size, self._score)

    def _row(self, prompt: Any, completion: Any, ids: list[int] | None, limit: int) -> Row:
        is_chat = not isinstance(prompt, str) and isinstance(completion, str)
        if ids is not None and not is_chat:
            return {"input_ids": self._ended(ids)[:limit]}
        if self.tokenizer is None or not isinstance(completion, str):
            raise ValueError(
                f"the reward adapter in {self.model.reward_adapter} has to read the text of a completion, got "
                f"{completion!r:.60} and tokenizer {type(self.tokenizer).__name__}; give the trainer its tokenizer"
            )
        return _encode(prompt, completion, self.tokenizer, limit, self.add_eos)

    def _ended(self, ids: list[int]) -> list[int]:
        """Return the tokens as in an encoded text: without what ended sampling, with EOS if the adapter expects it."""
        knows = self.model.config.get_text_config() if self.tokenizer is None else self.tokenizer
        eos = knows.eos_token_id
        special = {eos} if self.tokenizer is None else set(self.tokenizer.all_special_ids)
        while len(ids) > 1 and ids[-1] in special:
            ids = ids[:-1]
        return [*ids, eos] if self.add_eos and eos is not None else ids

    def _score(self, rows: list[Row]) -> Tensor:
        """Return the scores (B,) on the host, of texts padded on the right."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        scores: Tensor = self.model.compute_reward_score(ids, mask).cpu()
        return scores[torch.arange(len(rows)), lengths - 1, self.label]


def _label_number(config: Any, label: int | str) -> int:
    """Return the number of a label, from the end for the negative ones."""
    names: dict[str, int] = getattr(config, "label2id", None) or {}
    number = names.get(label, config.num_labels) if isinstance(label, str) else label
    if not -config.num_labels <= number < config.num_labels:
        raise ValueError(f"there is no label {label!r}; the model has {config.num_labels}, named {sorted(names)}")
    return number


def is_same_tokenizer(first: Any, second: Any) -> bool:
    """Whether two tokenizers provably make the same tokens of every text and chat; in doubt they do not."""
    descriptions = []
    for tokenizer in (first, second):
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            return False
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # set anew by every call
            rules.pop(name, None)
        descriptions.append((rules, tokenizer.chat_template, tokenizer.special_tokens_map))
    return bool(descriptions[0] == descriptions[1])


def text_ids(text: str, tokenizer: Any, **options: Any) -> list[int]:
    """Tokenise a finished text as RewardTrainer's models see it: ended by EOS where the tokenizer has one."""
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    eos_id = tokenizer.eos_token_id
    return ids if eos_id is None or ids[-1:] == [eos_id] else [*ids, eos_id]


def _encode(prompt: Any, completion: str, tokenizer: Any, limit: int, add_eos: bool) -> Row:
    """Encode prompt and completion as one text; a chat with the tokenizer's template, if it has one."""
    options: dict[str, Any] = {}
    if isinstance(prompt, str):
        text = prompt + completion
    elif getattr(tokenizer, "chat_template", None):
        answer = {"role": "assistant", "content": completion}
        text, options = tokenizer.apply_chat_template([*prompt, answer], tokenize=False), {"add_special_tokens": False}
    else:
        text = "\n".join(str(message.get("content", "")) for message in prompt) + completion
    # What is too long loses its beginning: the completion, which is to be scored, is at the end.
    if add_eos:
        return {"input_ids": text_ids(text, tokenizer, **options)[-limit:]}
    # The tokenizer cuts, because it knows the tokens that have to stay at either end.
    cut = {"truncation": True, "max_length": limit} if limit < _NO_LIMIT else {}
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        return dict(tokenizer(text, **options, **cut))
    finally:
        tokenizer.truncation_side = side


def _limit(model: Any, tokenizer: Any) -> int:
    """Return how many tokens model and tokenizer take."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:  # those of RoBERTa and its like begin behind one that stands for padding
        tables = [part for name, part in model.named_modules() if name.endswith(".position_embeddings")]
        padding = [part.padding_idx for part in tables if getattr(part, "padding_idx", None) is not None]
        positions -= max(padding, default=-1) + 1
    return min(positions or _NO_LIMIT, _NO_LIMIT if tokenizer is None else tokenizer.model_max_length)


def _in_batches(rows: Sequence[Row], size: int, score: Callable[[list[Row]], Tensor]) -> Tensor:
    """Return the scores, (B,) fp32 on the host, of rows taken `size` at a time; NaN for a row without tokens."""
    scores, filled = torch.full((len(rows),), math.nan), [i for i, row in enumerate(rows) if row["input_ids"]]
    for start in range(0, len(filled), size):
        part = filled[start : start + size]
        scores[part] = score([rows[i] for i in part])
    return scores


def _saved_tokenizer(source: str) -> Any:
    """Return the tokenizer that lies in a directory or hub repository, None where there is none."""
    if find_file(source, "tokenizer_config.json") is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def _is_ended(source: str) -> bool:
    """Whether RewardTrainer wrote beside an adapter that it ended every text by EOS."""
    path = find_file(source, ADAPTER_FILE)
    if path is None:
        return False
    with open(path, encoding="utf-8") as file:
        return bool(json.load(file)[ENDS_WITH_EOS])
