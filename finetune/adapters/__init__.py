"""Adapters (PEFT methods), one file each: the file's name is its name in `adapter.method`."""

SHARED = ("traits",)
"""Modules of this folder that are not adapters."""


def register_peft_types() -> None:
    """Register the adapter types of this package, BOTTLENECK and BITFIT, with PEFT.

    PEFT's and transformers' ``from_pretrained`` and ``load_adapter`` then load such adapters.
    """
    from finetune.adapters import _bias_layer, _bottleneck_layer  # noqa: F401  # importing them registers them
