"""Imported once by the server from which ranks are forked, so that each starts at once."""

import torch
import transformers.models.bert.modeling_bert

import trainers.tasks.text_classification
import trainers.worker

torch.set_num_threads(1)

__all__ = ["torch", "trainers", "transformers"]
