"""BERT pretraining on packed rows."""
