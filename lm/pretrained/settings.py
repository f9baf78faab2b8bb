"""The settings of a model in a config.json, each of which must be understood."""

from collections.abc import Mapping
from typing import Any

from lm.errors import InputError, shown

# Keys that say nothing of the function that the model computes when it is not trained.
_IRRELEVANT = """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    architectures attention_dropout attn_pdrop auto_map bad_words_ids begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id length_penalty max_length
    max_position_embeddings min_length model_type n_ctx n_positions no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences original_max_position_embeddings
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache vocab_size
"""


# No size of a model is as large, and no base or scale. Indices are int32.
_MOST_SIZE, _MOST = 2**31, 2**40


class Settings:
    """A config.json that is read key by key, so that at the end none is left unread.

    Args:
      values: the content of config.json.
      where: the file, for error messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self._read: set[str] = set()

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        """The value of a key, which must be of `kind`; `default` where it is missing or null.

        Raises:
          InputError: another type, or no number where `default` is None.
        """
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            value = default
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        least, most = (0, _MOST_SIZE) if kind is int else (-_MOST, _MOST)
        if number and not least <= value < most:
            raise InputError(f"{self.where}: {key}={shown(value, 40)} is out of range")
        if kind is float and number:
            value = float(value)
        if value is None and kind in (int, float):
            raise InputError(f"{self.where}: {key} is missing")
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            names = getattr(kind, "__name__", "a known type")
            raise InputError(f"{self.where}: {key}={shown(repr(value))} must be of type {names}")
        return value

    def has(self, key: str) -> bool:
        """Whether a key is there and not null."""
        return self.values.get(key) is not None

    def only(self, key: str, *valid: Any) -> Any:
        """The value of a key that may have these values alone, the first of them by default.

        Raises:
          InputError: another value.
        """
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            return valid[0]
        if value not in valid or isinstance(value, bool) != isinstance(valid[0], bool):
            raise InputError(
                f"{self.where}: {key}={shown(repr(value))} is not known; valid: "
                f"{', '.join(map(repr, valid))}"
            )
        return value

    def ignore(self, *keys: str) -> None:
        """Marks keys that have no effect, given the others."""
        self._read.update(keys)

    def check_all_read(self) -> None:
        """Raises InputError with the keys that nobody has read."""
        left = sorted(self.values.keys() - self._read - set(_IRRELEVANT.split()))
        if left:
            listed = [f"{shown(key, 40)}={shown(repr(self.values[key]), 40)}" for key in left[:10]]
            raise InputError(
                f"{self.where}: keys that are not known for its model_type: {', '.join(listed)}"
            )
