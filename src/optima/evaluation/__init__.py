"""What a pruned model can still do. The protocol stands here so that help needs no torch."""

PROTOCOL = (
    'documents joined by "\\n\\n" and tokenised once; non-overlapping windows of max-seq-length tokens, each with the '
    "special tokens that the tokenizer adds (BOS at the front); exp of the mean negative log-likelihood of next tokens"
)
