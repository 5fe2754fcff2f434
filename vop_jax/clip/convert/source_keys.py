"""The keys of other people's config files, one table for each kind of file, and published heads.

A key in none of the lists is refused by name, as an unknown tensor is: it may change the model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

NOTHING: tuple[Any, ...] = (None, {}, [], "")


class ConfigKeys(NamedTuple):
    """The keys of one kind of file, dotted if they are in a section.

    Attributes:
        sizes: key -> (field of `ClipConfig`, its library's default); compared with the tensors.
        required: key -> the values with which the model is a CLIP of this package.
        used: further keys that `source_config` evaluates.
        ignored: keys without effect on features, in any section.
    """

    sizes: Mapping[str, tuple[str, int]]
    required: Mapping[str, tuple[Any, ...]]
    used: frozenset[str]
    ignored: frozenset[str]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _allow(values: tuple[Any, ...], keys: str) -> dict[str, tuple[Any, ...]]:
    """{key: values}; `*` in a key stands for both towers, vision and text."""
    towers = ("vision", "text")
    return dict.fromkeys((k.replace("*", tower) for k in keys.split() for tower in towers), values)


# Heads by width of a tower, where all models in open_clip's list agree.
PUBLISHED_HEADS = {
    "vision": {384: 6, 512: 8, 768: 12, 896: 14, 1024: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16},
    "text": {256: 4, 384: 6, 512: 8, 640: 10, 768: 12, 1024: 16, 1280: 20},
}

NO_KEYS = ConfigKeys({}, {}, frozenset(), frozenset())

OPEN_CLIP = ConfigKeys(
    sizes={
        "embed_dim": ("embed_dim", 0),
        "vision_cfg.image_size": ("image_size", 224),
        "vision_cfg.patch_size": ("patch_size", 16),
        "vision_cfg.width": ("vision_width", 768),
        "vision_cfg.layers": ("vision_layers", 12),
        "text_cfg.width": ("text_width", 512),
        "text_cfg.layers": ("text_layers", 12),
        "text_cfg.heads": ("text_heads", 8),
        "text_cfg.context_length": ("context_length", 77),
        "text_cfg.vocab_size": ("vocab_size", 49408),
    },
    required={
        "quick_gelu": (True, False),
        "vision_cfg.pos_embed_type": ("learnable",),
        "vision_cfg.pool_type": ("tok",),
        "text_cfg.pool_type": ("argmax",),
        "text_cfg.proj_type": ("linear",),
        "preprocess_cfg.mode": ("RGB",),
        **_allow(
            NOTHING,
            "init_logit_bias vision_cfg.timm_model_name text_cfg.hf_model_name "
            "text_cfg.hf_tokenizer_name text_cfg.tokenizer_mode text_cfg.tokenizer_kwargs",
        ),
        **_allow(
            (False,),
            "vision_cfg.attentional_pool vision_cfg.global_average_pool vision_cfg.input_patchnorm "
            "vision_cfg.no_ln_pre text_cfg.embed_cls text_cfg.no_causal_mask text_cfg.proj_bias "
            "*_cfg.qk_norm *_cfg.scaled_cosine_attn *_cfg.scale_heads *_cfg.scale_attn_inner "
            "*_cfg.scale_attn *_cfg.scale_fc",
        ),
        **_allow((None,), "*_cfg.ls_init_value"),
        **_allow((None, "default"), "*_cfg.block_type"),
        **_allow((*NOTHING, {"approximate": "none"}), "*_cfg.act_kwargs"),
        **_allow((*NOTHING, {"eps": 1e-5}), "*_cfg.norm_kwargs"),
    },
    used=_words("""
        vision_cfg.head_width vision_cfg.mlp_ratio text_cfg.mlp_ratio preprocess_cfg.mean
        preprocess_cfg.std preprocess_cfg.size preprocess_cfg.interpolation
        preprocess_cfg.resize_mode
    """),
    # `custom_text` renames tensors; `patch_dropout` and `timm_drop` act in training only;
    # `final_ln_after_pool` makes no difference for one token; the `attn_pooler` is off.
    ignored=_words("""
        custom_text init_logit_scale nonscalar_logit_scale output_dict output_tokens patch_dropout
        final_ln_after_pool attn_pooler_queries attn_pooler_heads eos_id pad_id fill_color
        timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path timm_model_pretrained
        hf_model_pretrained hf_proj_type hf_pooler_type
    """),
)

# Keys of every config of transformers, about generation, training, files and outputs.
_PRETRAINED = _words("""
_attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id
length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version
typical_p use_bfloat16 use_cache
""")

HUGGING_FACE = ConfigKeys(
    sizes={
        "projection_dim": ("embed_dim", 512),
        "vision_config.image_size": ("image_size", 224),
        "vision_config.patch_size": ("patch_size", 32),
        "vision_config.hidden_size": ("vision_width", 768),
        "vision_config.intermediate_size": ("vision_mlp", 3072),
        "vision_config.num_hidden_layers": ("vision_layers", 12),
        "vision_config.num_attention_heads": ("vision_heads", 12),
        "text_config.hidden_size": ("text_width", 512),
        "text_config.intermediate_size": ("text_mlp", 2048),
        "text_config.num_hidden_layers": ("text_layers", 12),
        "text_config.num_attention_heads": ("text_heads", 8),
        "text_config.max_position_embeddings": ("context_length", 77),
        "text_config.vocab_size": ("vocab_size", 49408),
    },
    required={
        "model_type": ("clip",),
        "vision_config.model_type": ("clip", "clip_vision_model"),
        "text_config.model_type": ("clip", "clip_text_model"),
        "vision_config.num_channels": (3,),
        **_allow((1e-5,), "*_config.layer_norm_eps"),
        **_allow(NOTHING, "pruned_heads *_config.pruned_heads"),
    },
    used=_words("vision_config.hidden_act text_config.hidden_act text_config.eos_token_id"),
    # A tower's own `projection_dim` is for the tower as a model of its own.
    ignored=_PRETRAINED
    | _words("""
        attention_dropout dropout gradient_checkpointing initializer_factor initializer_range
        logit_scale_init_value projection_dim
    """),
)

PREPROCESSOR = ConfigKeys(
    sizes={},
    required={"do_normalize": (True, False), "do_rescale": (True,), "do_pad": (False, None)},
    used=_words(
        "rescale_factor image_mean image_std do_resize size resample do_center_crop crop_size"
    ),
    ignored=_words(
        "_valid_processor_keys data_format default_to_square device disable_grouping "
        "do_convert_rgb feature_extractor_type image_processor_type image_seq_length "
        "input_data_format pad_size processor_class return_tensors"
    ),
)
