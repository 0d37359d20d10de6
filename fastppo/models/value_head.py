"""Language models with a scalar value head, under TRL's names and in TRL's checkpoint layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastppo.atomic import atomic_files
from fastppo.models import loading
from fastppo.models.critic import load_critic, save_critic
from fastppo.models.reward_adapter import load_reward_adapter, reward_scores

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.10 has it not

VALUE_HEAD_FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """A linear map from hidden states (..., H) to values (..., 1), in fp32 whatever the model's dtype."""

    def __init__(self, config: Any, summary_dropout_prob: float = 0.0, **kwargs: Any):
        super().__init__()
        probability = getattr(config, "summary_dropout_prob", summary_dropout_prob)
        self.dropout = nn.Dropout(probability) if probability else nn.Identity()
        text = config.get_text_config(decoder=True)
        size = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
        self.summary = nn.Linear(size, 1, dtype=torch.float32)
        if kwargs.get("v_head_init_strategy") == "normal":
            nn.init.normal_(self.summary.weight, std=kwargs.get("v_head_initializer_range", 0.2))
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the values (..., 1), fp32, of hidden states (..., H) of any dtype."""
        result: Tensor = self.summary(self.dropout(hidden).to(self.summary.weight.dtype))
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow `model.to(...)` to another device, but never to half precision, in which returns would be rounded."""

        def kept_wide(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype in (torch.float32, torch.float64) else tensor.to(moved.device)

        return super()._apply(kept_wide, recurse)


class PreTrainedModelWrapper(nn.Module):
    """What the two kinds of language models with a value head have in common."""

    supported_args = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")
    is_encoder_decoder: bool

    def __init__(self, pretrained_model: Any, **kwargs: Any):
        super().__init__()
        unknown = sorted(set(kwargs) - set(self.supported_args))
        if unknown:
            raise TypeError(f"unknown arguments {unknown}; expected some of {list(self.supported_args)}")
        name = type(pretrained_model).__name__
        if pretrained_model.get_output_embeddings() is None:
            kind = "Seq2Seq" if self.is_encoder_decoder else "Causal"
            raise ValueError(f"{name} has no language-model head; load an AutoModelFor{kind}LM")
        if pretrained_model.config.is_encoder_decoder != self.is_encoder_decoder:
            found = ("no encoder", "Causal") if self.is_encoder_decoder else ("an encoder", "Seq2Seq")
            raise ValueError(f"{name} has {found[0]}; wrap it with AutoModelFor{found[1]}LMWithValueHead")
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.is_peft_model = hasattr(pretrained_model, "peft_config")
        self.v_head = ValueHead(self.config, **kwargs).to(pretrained_model.device)
        self.critic: Any = None
        self.score: Any = None
        self.reward_adapter: str | None = None
        self.reward_adapter_name: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Self:
        """Load a model and, where the checkpoint has one, its value head; otherwise the head starts at random.

        Args:
            pretrained_model_name_or_path: hub name, directory (of a model or of an adapter), or a model.
            peft_config: a PEFT config; adds a fresh adapter and freezes the rest.
            is_trainable: whether an adapter found in the checkpoint is trained further (default True).
            reward_adapter: directory or hub name of a PEFT sequence-classification adapter for the same base, which is
                a causal model; see `compute_reward_score`.
            reward_adapter_name: what it is called here (default "reward_model_adapter").
            summary_dropout_prob, v_head_initializer_range, v_head_init_strategy: the value head's.
            int8_meaning: what 8-bit layers compute: "weight_only" (the default) leaves activations as they are,
                "row_wise" rounds each row of them to int8, in the rollout and in the update alike.
            load_in_8bit, load_in_4bit, torch_dtype and everything else: transformers' `from_pretrained`.

        Weights that are to be trained are loaded in fp32 unless `dtype` says otherwise. A critic that was saved with
        the model is loaded too.
        Raises ValueError for a checkpoint whose value head is only there as a pickle; `fastppo convert` imports it.
        """
        head_kwargs = {name: kwargs.pop(name) for name in cls.supported_args if name in kwargs}
        reward_adapter = kwargs.pop("reward_adapter", None)
        if reward_adapter is not None and cls.is_encoder_decoder:
            raise ValueError(
                f"reward_adapter={reward_adapter!r} scores a text as a causal model reads it, which an encoder-decoder "
                "does not; pass the reward model to train(...) as the reward"
            )
        reward_adapter_name = kwargs.pop("reward_adapter_name", "reward_model_adapter")
        kwargs["is_encoder_decoder"] = cls.is_encoder_decoder
        source = loading.load_base(pretrained_model_name_or_path, *model_args, **kwargs)
        model = cls(source.model, **head_kwargs)
        hub = loading.hub_arguments(kwargs)
        if source.value_head is not None:
            model.v_head.load_state_dict(source.value_head)
            load_critic(model, os.fspath(pretrained_model_name_or_path), **hub)
        if reward_adapter is not None:
            place = {key: value for key, value in hub.items() if key in ("token", "cache_dir")}
            load_reward_adapter(model, os.fspath(reward_adapter), reward_adapter_name, **place)
        return model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call transformers' own `generate`; `fastppo.Engine` is the fast way."""
        return self.pretrained_model.generate(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the model's tensors under the names that they have without the head, and `v_head.summary.*`.

        Those of a second network begin with `critic.`.
        """
        state: dict[str, Any] = self.pretrained_model.state_dict(*args, **kwargs)
        for name, part in (("v_head.", self.v_head), ("critic.", self.critic)):
            state |= {} if part is None else part.state_dict(*args, prefix=name, **kwargs)
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned."""
        rest = dict(state_dict)
        for prefix, part in (("v_head.", self.v_head), ("critic.", self.critic)):
            if part is not None:
                own = {name.removeprefix(prefix): rest.pop(name) for name in list(rest) if name.startswith(prefix)}
                part.load_state_dict(own, strict=strict, assign=assign)
        return self.pretrained_model.load_state_dict(rest, strict=strict, assign=assign)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save a checkpoint that plain transformers (or, with an adapter, plain PEFT) opens, with the value head in it.

        A full model keeps the head in its own weights file, under `v_head.summary.*`; beside an adapter it is
        `value_head.safetensors`. A critic of its own is in the folder `fastppo_critic`.
        """
        head = {f"v_head.{name}": t.detach().cpu().contiguous() for name, t in self.v_head.state_dict().items()}
        with atomic_files(save_directory) as directory:
            if self.is_peft_model:
                active = list(self.pretrained_model.active_adapters)[:1]
                self.pretrained_model.save_pretrained(directory, selected_adapters=active, **kwargs)
                save_file(head, directory / VALUE_HEAD_FILE, metadata={"format": "pt"})
            else:
                state = kwargs.pop("state_dict", None) or self.pretrained_model.state_dict()
                self.pretrained_model.save_pretrained(directory, state_dict={**state, **head}, **kwargs)
            save_critic(self, directory)

    def push_to_hub(self, repo_id: str, *, card: str | None = None, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub, with a card as its README."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.pop("token", None))
        api.create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None))
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, **kwargs)
            if card is not None:
                (Path(directory) / "README.md").write_text(card, encoding="utf-8")
            return api.upload_folder(repo_id=repo_id, folder_path=directory)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Trade compute for memory in the update; the rollout keeps its cache."""
        for network in filter(None, (self.pretrained_model, self.critic)):
            _checkpointing_method(network, "enable")(gradient_checkpointing_kwargs, **kwargs)
        if self.is_peft_model:
            self.pretrained_model.enable_input_require_grads()

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        for network in filter(None, (self.pretrained_model, self.critic)):
            _checkpointing_method(network, "disable")()

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        device: torch.device = self.pretrained_model.device
        return device


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A causal language model and a value head on its last hidden state.

    `from_pretrained` takes a hub name, a path, a transformers model or a PEFT model. `critic` is a second network for
    the value head to read, or None; `score` is the score head (H -> labels) of a reward adapter, or None.
    """

    is_encoder_decoder = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Return (logits (B, L, V) in fp32, loss or None, values (B, L)), and past key values if asked for."""
        output = self.pretrained_model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            output_hidden_states=True,
            **_places(input_ids, attention_mask, kwargs),
        )
        values = self.v_head(output.hidden_states[-1]).squeeze(-1)
        result = (output.logits.float(), output.loss, values)
        return (*result, output.past_key_values) if return_past_key_values else result

    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the reward adapter's scores (B, L, labels), fp32, at every token of input_ids (B, L).

        A text's score is that of its last token. No gradient; adapters, flags and training mode stay as they were.
        Raises ValueError without a reward adapter.
        """
        kwargs.pop("ppo_adapter_name", None)  # TRL's; the adapter that was on is on again afterwards
        return reward_scores(self, input_ids, attention_mask, **_places(input_ids, attention_mask, kwargs))


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder, such as T5 or BART, and a value head on its decoder's last hidden state.

    `from_pretrained` takes a hub name, a path, a transformers model or a PEFT model. `critic` is a second network for
    the value head to read, or None. A reward adapter is not for such a model, for it scores a text as a decoder alone
    reads it: use a reward model of its own.
    """

    is_encoder_decoder = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Return (logits (B, T, V) in fp32, loss or None, values (B, T)), and past key values if asked for.

        T are the tokens of the decoder, from decoder_input_ids or labels among `kwargs`, input_ids the encoder's.
        """
        output = self.pretrained_model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            output_hidden_states=True,
            **kwargs,
        )
        values = self.v_head(output.decoder_hidden_states[-1]).squeeze(-1)
        result = (output.logits.float(), output.loss, values)
        return (*result, output.past_key_values) if return_past_key_values else result


def _checkpointing_method(network: Any, action: str) -> Any:
    """Return transformers' method under its new name (from 5.23 on, where the old one warns) or its old one."""
    old, new = (f"{kind}_checkpointing_{action}" for kind in ("gradient", "activation"))
    return getattr(network, new, None) or getattr(network, old)


def _places(input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with the positions that padding on the left asks for, unless they are among them.

    A mask is longer than the tokens where a cache holds those before them.
    """
    if attention_mask is None or "position_ids" in kwargs or bool(attention_mask[:, 0].all()):
        return kwargs
    given = kwargs["inputs_embeds"] if input_ids is None else input_ids
    return {**kwargs, "position_ids": (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -given.shape[1] :]}
