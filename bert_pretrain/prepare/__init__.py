"""Text -> sequences to pretrain on, in training and test, and the tokenizer.

prepare      the whole way, read from top to bottom
documents    sources -> documents -> sentences
tokenizer    a tokenizer, trained or loaded
text         the passes over the text
tokens       documents as token ids
sequences    documents -> sequences
build        documents -> a folder of sequences
summary      the numbers of a prepared split
"""
