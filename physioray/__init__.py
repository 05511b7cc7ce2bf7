"""physioray: from raw overnight recordings to pretrained models and filled result tables."""

__version__ = "0.1.0"
