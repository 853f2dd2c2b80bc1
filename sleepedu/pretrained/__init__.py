"""Pretrained models of transformers that go to sleep: needs ``pip install 'sleepedu[pretrained]'``.

A hybrid sleeps with its own fast weights (``load``), a transformer gets some (``retrofit``). Both are called as a
``SleepLM`` is, by ``sleep``, ``run_episode``, ``Session``, ``SleepTrace`` and ``train``.
"""

from sleepedu.pretrained.blocks import PretrainedConfig, PretrainedLM
from sleepedu.pretrained.loading import add_lora, load, restore, retrofit, save, tokenizer_of

__all__ = ["PretrainedConfig", "PretrainedLM", "add_lora", "load", "restore", "retrofit", "save", "tokenizer_of"]
