"""The arguments of the engines: which of them ``train.engine_args`` passes on, why it refuses the others.

The engine is transformers' Trainer (``TrainingArguments``), or the TRL trainer of the stage (``SFTConfig``
and others, which extend ``TrainingArguments``). An argument is passed on if it has an effect in that engine
and keeps what llm-align guarantees: exact resumption, checks before step 0, held-out evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from finetune.recipe.settings import PositiveInt


@dataclass(frozen=True, slots=True)
class Passed:
    """An argument that is passed on.

    Attributes:
        values: the type of its values.
        effect: what it does.
        ignored_by: values of ``train.optimizer`` with which it has no effect.
    """

    values: Any
    effect: str
    ignored_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ByRecipe:
    """An argument that the recipe decides, by the key ``key``."""

    key: str


@dataclass(frozen=True, slots=True)
class Refused:
    """An argument without effect in llm-align, or one that would break a run: why, and what to do instead."""

    reason: str
    repair: str = "remove it"


Argument = Passed | ByRecipe | Refused


def _by_recipe(**keys: str) -> dict[str, Argument]:
    """Return arguments, given as ``recipe key (two underscores for its dot) = names``."""
    return {name: ByRecipe(key.replace("__", ".")) for key, names in keys.items() for name in names.split()}


def _refused(names: str, reason: str, repair: str = "remove it") -> dict[str, Argument]:
    return dict.fromkeys(names.split(), Refused(reason, repair))


TRAINING_ARGUMENTS: Mapping[str, Argument] = {
    "adam_epsilon": Passed(
        Annotated[float, Field(gt=0, lt=1)], "epsilon in the denominator of AdamW's update", ("adafactor",)
    ),
    "tf32": Passed(bool, "TF32 in float32 matrix products; true needs an NVIDIA GPU (Ampere or newer)"),
    "torch_empty_cache_steps": Passed(PositiveInt, "steps between releases of the GPU's cached memory"),
    **_by_recipe(
        train__epochs="num_train_epochs",
        train__max_steps="max_steps",
        train__batch_size="gradient_accumulation_steps",
        train__micro_batch_size="per_device_train_batch_size per_device_eval_batch_size auto_find_batch_size",
        train__learning_rate="learning_rate",
        train__lr_schedule="lr_scheduler_type lr_scheduler_kwargs",
        train__warmup="warmup_steps",
        train__optimizer="optim",
        train__betas="adam_beta1 adam_beta2",
        train__weight_decay="weight_decay",
        train__max_grad_norm="max_grad_norm",
        train__label_smoothing="label_smoothing_factor",
        train__neftune_alpha="neftune_noise_alpha",
        train__seed="seed data_seed",
        model__precision="bf16 fp16",
        train__gradient_checkpointing="activation_checkpointing activation_checkpointing_kwargs "
        "gradient_checkpointing gradient_checkpointing_kwargs",
        train__log_every="logging_strategy logging_steps logging_first_step",
        train__evaluate_every="eval_strategy eval_steps eval_delay eval_on_start",
        train__checkpoint_every="save_strategy save_steps",
        train__keep_checkpoints="save_total_limit",
        train__group_by_length="train_sampling_strategy length_column_name",
        train__strategy="deepspeed fsdp fsdp_config parallelism_config accelerator_config ddp_backend "
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph",
        train__num_processes="local_rank",
    ),
    "output_dir": ByRecipe("--out"),
    **_refused("save_only_model", "a checkpoint without optimizer state and RNG states cannot be resumed"),
    **_refused("ignore_data_skip", "a resumed run would train again on rows that it has trained on"),
    **_refused(
        "resume_from_checkpoint",
        "a run resumes from its newest valid checkpoint",
        "remove it; the same command resumes the run",
    ),
    **_refused(
        "restore_callback_states_from_checkpoint", "llm-align's callbacks restore their states themselves"
    ),
    **_refused("enable_jit_checkpoint", "llm-align saves a checkpoint at SIGTERM and SIGINT itself"),
    **_refused("save_on_each_node", "a checkpoint is written once, with the checksums of its files"),
    **_refused(
        "load_best_model_at_end metric_for_best_model greater_is_better",
        "the run saves the weights of its last step, which its metrics and samples describe",
        "remove it; train.max_steps ends the run at an earlier step",
    ),
    **_refused(
        "dataloader_drop_last", "every epoch trains on all rows: its last step has the rows that are left"
    ),
    **_refused(
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order",
        "rows are tokenized before step 0, and the training process builds the batches itself",
    ),
    **_refused("remove_unused_columns label_names", "the stage decides what a batch has"),
    **_refused("average_tokens_across_devices", "the loss is the mean over the labels of all processes"),
    **_refused(
        "use_liger_kernel liger_kernel_config torch_compile torch_compile_backend torch_compile_mode",
        "the checks before step 0 would have tested another forward pass",
    ),
    **_refused("full_determinism", "it changes the kernels after the checks before step 0 tested others"),
    **_refused("use_cpu", "the device is chosen before the base is loaded"),
    **_refused("use_cache", "training has no key-value cache"),
    **_refused("ddp_timeout", "the process group exists before the engine reads it"),
    **_refused("debug", "it adds hooks to the model; a NaN loss stops a run and names its rows"),
    **_refused("logging_nan_inf_filter", "it would hide a NaN loss, at which a run stops"),
    **_refused(
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
        "a run does not upload anything",
        "remove it; upload the finished run's adapter/ with the hf command",
    ),
    **_refused(
        "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id",
        "a run logs to metrics.jsonl only",
        "remove it; docs/runs.md shows how to send metrics.jsonl to a tracker",
    ),
    **_refused(
        "disable_tqdm log_level log_level_replica log_on_each_node", "llm-align prints the progress itself"
    ),
    **_refused(
        "include_num_input_tokens_seen skip_memory_metrics",
        "llm-align measures tokens per second and memory itself",
    ),
    **_refused(
        "bf16_full_eval fp16_full_eval prediction_loss_only eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps include_for_metrics batch_eval_metrics",
        "without effect: llm-align evaluates held-out rows itself",
    ),
    **_refused("optim_args optim_target_modules", "without effect: no value of train.optimizer reads it"),
    **_refused("do_train do_eval do_predict", "without effect: for scripts that read it themselves"),
}
"""Arguments of every engine."""

_TRL: Mapping[str, Argument] = _by_recipe(
    model__base="model_init_kwargs",
    model__trust_remote_code="trust_remote_code",
)
_AUXILIARY_LOSS = _refused("router_aux_loss_coef", "the held-out loss has no auxiliary loss")
_TOKENIZED: Mapping[str, Argument] = {
    **_by_recipe(data__max_length="max_length"),
    **_refused("dataset_num_proc", "without effect: llm-align tokenizes the rows"),
}
_OFFLOADING = _refused(
    "activation_offloading",
    "not tested with llm-align's adapters",
    "remove it; train.gradient_checkpointing=true saves memory",
)
_DROPOUT = _by_recipe(adapter__dropout="disable_dropout")
_PADDING: Mapping[str, Argument] = {
    "pad_to_multiple_of": Passed(PositiveInt, "pads batches to a multiple of this number of tokens")
}
_REFERENCE = _refused(
    "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "the reference is the initial policy in every step",
)
_PRECOMPUTED = _refused(
    "precompute_ref_log_probs precompute_ref_batch_size",
    "llm-align computes the reference's log-probabilities before step 0",
)
_ON_POLICY = _refused(
    "num_iterations steps_per_generation generation_batch_size",
    "each step trains once, on completions that the current policy sampled",
)
_SAMPLER = _refused(
    "top_p top_k min_p repetition_penalty generation_kwargs cache_implementation use_vllm vllm_mode "
    "vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url "
    "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization "
    "vllm_max_model_length vllm_tensor_parallel_size use_transformers_continuous_batching "
    "transformers_continuous_batching_config use_transformers_paged",
    "completions are sampled by the model's generate, from the full distribution",
)
_RATIO = "without effect: each step trains once on new completions, so the ratio is 1"
_ONLINE: Mapping[str, Argument] = {
    **_TRL,
    **_AUXILIARY_LOSS,
    **_PADDING,
    **_DROPOUT,
    **_REFERENCE,
    **_ON_POLICY,
    **_SAMPLER,
    "mask_truncated_completions": Passed(bool, "completions without end-of-sequence token get no loss"),
    **_by_recipe(
        sampling__temperature="temperature",
        sampling__max_new_tokens="max_completion_length",
        sampling__num_generations="num_generations num_generations_eval",
        data__template_options="chat_template_kwargs",
        rewards__sources="reward_weights",
        train__seed="shuffle_dataset",
        train__strategy="ds3_gather_for_generation",
    ),
    **_refused("epsilon epsilon_high", _RATIO),
    **_refused(
        "log_completions log_multimodal num_completions_to_print log_unique_prompts",
        "samples.jsonl has completions from before and after training",
    ),
}

TRL_ARGUMENTS: Mapping[str, Mapping[str, Argument]] = {
    "SFTConfig": {
        **_TRL,
        **_AUXILIARY_LOSS,
        **_TOKENIZED,
        **_OFFLOADING,
        **_PADDING,
        "padding_free": Passed(bool, "concatenates the rows of a batch; needs FlashAttention"),
        **_by_recipe(
            data__columns="dataset_text_field dataset_kwargs",
            data__template="chat_template_path eos_token pad_token",
            data__overflow="truncation_mode",
            data__packing="packing packing_strategy eval_packing",
            data__loss_on="completion_only_loss assistant_only_loss",
            train__seed="shuffle_dataset",
        ),
        **_refused("loss_type", "the held-out loss is the mean negative log-likelihood of the labels"),
    },
    "RewardConfig": {
        **_TRL,
        **_TOKENIZED,
        **_OFFLOADING,
        **_PADDING,
        **_DROPOUT,
        **_by_recipe(
            data__template="chat_template_path eos_token pad_token",
            reward__center_rewards_coefficient="center_rewards_coefficient",
        ),
    },
    "DPOConfig": {
        **_TRL,
        **_AUXILIARY_LOSS,
        **_TOKENIZED,
        **_OFFLOADING,
        **_PADDING,
        **_DROPOUT,
        **_REFERENCE,
        **_PRECOMPUTED,
        **_by_recipe(
            data__template="pad_token",
            data__overflow="truncation_mode",
            dpo__loss="loss_type loss_weights beta label_smoothing ld_alpha f_divergence_type "
            "f_alpha_divergence_coef use_weighting discopop_tau",
        ),
        **_refused("padding_free", "without effect: TRL's DPOTrainer pads all rows"),
    },
    "KTOConfig": {
        **_TRL,
        **_AUXILIARY_LOSS,
        **_TOKENIZED,
        **_OFFLOADING,
        **_PADDING,
        **_DROPOUT,
        **_REFERENCE,
        **_PRECOMPUTED,
        **_by_recipe(
            kto__beta="beta",
            kto__desirable_weight="desirable_weight",
            kto__undesirable_weight="undesirable_weight",
        ),
        **_refused("loss_type", "the stage's loss is KTO"),
    },
    "GRPOConfig": {
        **_ONLINE,
        "top_entropy_quantile": Passed(
            Annotated[float, Field(gt=0, le=1)], "fraction of tokens, those of highest entropy, with loss"
        ),
        "entropy_coef": Passed(
            Annotated[float, Field(ge=0, le=1)], "coefficient of an entropy bonus in the loss"
        ),
        **_by_recipe(grpo__beta="beta", grpo__loss="loss_type", grpo__scale_rewards="scale_rewards"),
        **_refused("importance_sampling_level use_bias_correction_kl", "the loss is that of the paper"),
        **_refused("delta off_policy_mask_threshold", _RATIO),
        **_refused(
            "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg "
            "vespo_lambda_neg",
            "without effect: no value of grpo.loss reads it",
        ),
        **_refused(
            "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
            "the coefficient would depend on earlier steps, which exact resumption does not cover",
        ),
        **_refused("cast_lm_head_to_fp32", "it changes the frozen base", "model.precision=float32"),
        **_refused("multi_objective_aggregation", "without effect: TRL gets one reward, the weighted sum"),
        **_refused("max_tool_calling_iterations", "without effect: completions call no tools"),
        **_refused("log_completions_hub_repo", "a run does not upload anything"),
        **_refused(
            "vllm_importance_sampling_correction vllm_importance_sampling_mode "
            "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
            "vllm_importance_sampling_cap",
            "without effect: vLLM does not sample here",
        ),
    },
    "RLOOConfig": {
        **_ONLINE,
        **_by_recipe(rloo__beta="beta", rloo__normalize_advantages="normalize_advantages"),
        **_refused("reward_clip_range", "rewards are logged and compared as the recipe's sources give them"),
    },
}
"""The further arguments of TRL's configs, by class."""


def engine_arguments(engine: str, trl_config: str) -> dict[str, Argument]:
    """Return the arguments of a stage's engine; ``trl_config`` is the name of its TRL config class."""
    return {**TRAINING_ARGUMENTS, **(TRL_ARGUMENTS[trl_config] if engine == "trl" else {})}
