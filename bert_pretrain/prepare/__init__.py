"""Text -> sequences to pretrain on, in training and test, and the tokenizer.

prepare      the whole way, read from top to bottom
sources      where text lies
not_text     files that hold something else than text
documents    lines -> documents -> sentences
tokenizer    a tokenizer, trained or loaded
text         the passes over the text
tokens       documents as token ids
sequences    documents -> sequences
build        documents -> a folder of sequences
summary      the numbers of a prepared split
"""
