"""Names of columns and values of labels, without torch: who prepares text or prints help need not wait for it."""

IGNORED = -100
"""The label of a position where nothing is predicted (the value that torch's cross-entropy ignores)."""

PAIR_LABELS = {"nsp": "next_sentence_label", "sop": "sentence_order_label"}
"""What a model can learn about pairs of sentences -> the column of its labels, as transformers calls it.

    nsp   0: B follows A, 1: B comes from elsewhere         BertForPreTraining
    sop   0: A and B in order, 1: switched                  AlbertForPreTraining

In both a label is 0 or 1, or IGNORED.
"""

HEADS_OF_TOKENS = ("ForMaskedLM", "ForTokenClassification")
"""Ends of the names of stock classes whose labels belong to tokens. Their heads and losses mean on a pack what
they mean on its sequences."""

HEADS_OF_SEQUENCES = ("ForSequenceClassification", "ForNextSentencePrediction")
"""Ends of the names of stock classes whose labels belong to sequences."""

INPUT_IDS, LENGTHS, MASK = "input_ids", "sequence_lengths", "attention_mask"
WORD_IDS = "word_ids"
TOKEN_LEVEL = ("token_type_ids", "special_tokens_mask", WORD_IDS, "offset_mapping", MASK)
"""Columns that always have a value per token: tokenizers make them."""
NO_WORD_ID = -1
"""The word id of [CLS] and its like, where a tokenizer has None."""
MADE_HERE = ("sequence_ids", "position_ids", "cls_positions")
"""A column with one of these names would replace what the collator makes, and sequences would read each other."""
COHORTS = ("sequence_cohorts", "sequence_rounds", "sequence_lanes")
"""Where a pack belongs that was packed with cohorts."""
BOOKKEEPING = ("sequence_indices", "sequence_starts", *COHORTS, "special_tokens_mask", WORD_IDS)
"""Columns that the collator reads for itself; a model gets them only when `columns` names them."""
LABELS = ("labels", "label", "label_ids")
ANSWERS = ("start_positions", "end_positions")
"""Columns that hold positions in a sequence."""
