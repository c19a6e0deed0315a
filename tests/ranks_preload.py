"""Imported once by the server from which ranks are forked, so that each starts at once.

Also what a rank imports where it needs it, and tables that a library builds at its first use: they
take most of the processors' time of a rank that makes ten steps.
"""

import pyarrow.dataset
import sklearn.metrics
import tokenizers
import torch
import transformers.models.bert.modeling_bert
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import cluster.folder
import trainers.tasks.text_classification
import trainers.worker

torch.set_num_threads(1)
get_checkpoint_conversion_mapping("bert")

__all__ = [
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "cluster",
    "pyarrow",
    "sklearn",
    "tokenizers",
    "torch",
    "trainers",
    "transformers",
]
