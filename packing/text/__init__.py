"""Texts -> ids, by a tokenizer of the tokenizers library. It reads each distinct unit of the texts once.

encode       texts to ids: units out of a table, or the tokenizer reads all
rows         texts and rows of ids; encode_batch
reader       the ids of units that are new, by the tokenizer
plain        texts as the model sees them: it reads them without normalizer and pre-tokenizer
words        the same for words that are known by their first token
metaspace    where texts may be cut for Unigram and for BPE with spaces in its words
outcome      how much the tokenizer read; the text for which units are wrong
rules        where a tokenizer's texts may be cut into units
spaces       white space that becomes one space
table        the units met so far, and their ids, compiled
tokenizer    a tokenizer for which all text is text
pretrained   a tokenizer of transformers, without torch
units        what a rule is

Others import open_encoder, Texts, Amount and DifferentTokens from encode; describe and text_tokenizer from tokenizer;
load_pretrained from pretrained.
"""
