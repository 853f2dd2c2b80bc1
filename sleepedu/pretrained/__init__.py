"""Pretrained models of transformers that go to sleep: needs ``pip install 'sleepedu[pretrained]'``.

A hybrid sleeps with its own fast weights (``load``), a transformer gets some (``retrofit``). Both are called as a
``SleepLM`` is, by ``sleep``, ``run_episode``, ``Session``, ``SleepTrace`` and ``train``; ``finetune`` trains them.
"""

from sleepedu.pretrained.blocks import PretrainedConfig, PretrainedLM
from sleepedu.pretrained.finetuning import FineTuning, finetune
from sleepedu.pretrained.loading import add_lora, load, restore, retrofit, save
from sleepedu.pretrained.text import TextReasoning

__all__ = [
    "FineTuning",
    "PretrainedConfig",
    "PretrainedLM",
    "TextReasoning",
    "add_lora",
    "finetune",
    "load",
    "restore",
    "retrofit",
    "save",
]
