"""Which generation settings of a checkpoint the runtime honours, which change nothing here, and which it refuses.

Every field of transformers' `GenerationConfig` is in one of the tables. A field in none, such as one of a newer version, is
refused if it is set: it might change the answer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from leanvlm.runtime.errors import CheckpointError, InputError, UnsupportedModelError
from leanvlm.runtime.generation import GENERATION_CONFIG, SAMPLING_SETTINGS, GenerationSettings
from leanvlm.runtime.logits import LOGITS_SETTINGS
from leanvlm.runtime.records import load_json, shorten

HONOURED = ("eos_token_id", *SAMPLING_SETTINGS, *LOGITS_SETTINGS)

# The request decides on greedy or sampling and on the length; the others are about memory, speed, further outputs, or beams
# and assistants, which other fields turn on.
IRRELEVANT = (
    "do_sample", "temperature", "max_length", "max_new_tokens",
    "bos_token_id", "pad_token_id", "decoder_start_token_id",
    "early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups",
    "remove_invalid_values", "renormalize_logits",
    "use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory", "compile_config", "disable_compile",
    "continuous_batching_config",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "speculation_type", "transformers_version",
)  # fmt: skip

# Field to the values with which it does nothing; any other is refused.
REFUSED: dict[str, Collection[Any]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "constraints": (),
    "force_words_ids": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "stop_strings": ([],),
    "max_time": (),
    "assistant_ensemble_weight": (),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid"),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


def generation_config(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """Return a checkpoint's generation settings, as transformers finds them, for the bundle's generation_config.json.

    Args:
        folder: The checkpoint. Without a generation_config.json its config.json counts.
        config: The checkpoint's configuration.

    Raises:
        CheckpointError: The file cannot be read, or holds a value that is not possible.
        UnsupportedModelError: A setting that changes answers and that the runtime does not do.
    """
    path = folder / GENERATION_CONFIG
    data: dict[str, Any]
    if path.is_file():
        data = load_json(path, CheckpointError)
        if not isinstance(data, dict):
            raise CheckpointError(f"{path} cannot be read: it does not hold a JSON object")
    else:
        path = folder / "config.json"
        data = GenerationConfig.from_model_config(config).to_diff_dict()
    _refuse_unknown(path, data)
    try:
        GenerationSettings.from_dict(data)
    except InputError as error:
        raise CheckpointError(f"{path}: {shorten(error)}") from error
    return data


def _refuse_unknown(path: Path, data: Mapping[str, Any]) -> None:
    """Refuse a setting that is known to change answers, or that a newer transformers knows and we do not."""
    known = vars(GenerationConfig())
    for name, value in data.items():
        if value is None or name in HONOURED or name in IRRELEVANT or name.startswith("_"):
            continue
        if name in REFUSED and value in REFUSED[name]:
            continue
        if name in REFUSED or name in known:
            shown = shorten(json.dumps(value))
            raise UnsupportedModelError(
                f"{path} sets {name} = {shown}, which the runtime does not do; remove it there to export without"
            )
